//! The condition of an image: one class, or several classes along its tokens.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The class of an image, or its classes along the tokens. `None` is unconditional.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ClassSchedule {
    /// The same class for every token.
    Constant(Option<usize>),
    /// Classes of spans of tokens, from left to right. Where two spans share tokens, the first class fades into the
    /// second.
    Spans(Vec<ClassSpan>),
}

/// A span of tokens with one class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassSpan {
    /// Class of the span.
    pub class: Option<usize>,
    /// First token of the span.
    pub begin: usize,
    /// The token after the last one of the span; `None` is the end of the image.
    pub end: Option<usize>,
}

/// Condition of a row of a batch: the keys and values of one class, or a mix of two classes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassMix {
    /// Label of the class.
    pub label: i64,
    /// Label of the class that it fades into, and the share of that class in 0..1.
    pub blend: Option<(i64, f32)>,
}

impl ClassMix {
    /// The condition of one class.
    pub fn of(label: i64) -> Self {
        Self { label, blend: None }
    }

    /// Labels of the classes.
    pub fn labels(self) -> impl Iterator<Item = i64> {
        [self.label].into_iter().chain(self.blend.map(|(label, _)| label))
    }
}

impl ClassSpan {
    /// The token after the last one of the span, in an image of `tokens` tokens.
    fn end(&self, tokens: usize) -> usize {
        self.end.unwrap_or(tokens)
    }
}

impl From<Option<usize>> for ClassSchedule {
    fn from(class: Option<usize>) -> Self {
        Self::Constant(class)
    }
}

impl ClassSchedule {
    /// All classes of the schedule.
    pub fn classes(&self) -> impl Iterator<Item = usize> {
        let (one, spans) = match self {
            Self::Constant(class) => (*class, &[][..]),
            Self::Spans(spans) => (None, &spans[..]),
        };
        one.into_iter().chain(spans.iter().filter_map(|span| span.class))
    }

    /// Checks that each of the `tokens` tokens has one class, or two classes of which one fades into the other.
    ///
    /// # Errors
    /// [`Error::setting`] naming the tokens.
    pub fn check(&self, tokens: usize) -> Result<()> {
        let Self::Spans(spans) = self else { return Ok(()) };
        let bad = |problem: String| Err(Error::setting("classes", problem));
        let mut covered = 0;
        for (index, span) in spans.iter().enumerate() {
            let (begin, end) = (span.begin, span.end(tokens));
            if begin > covered {
                return bad(format!("leaves tokens {covered} to {} without a class", begin - 1));
            }
            if begin >= tokens || end > tokens {
                let shown = span.end.map_or(String::new(), |end| end.to_string());
                return bad(format!(
                    "names tokens {begin}-{shown}, but the image has {tokens} tokens, 0 to {}",
                    tokens - 1
                ));
            }
            if end <= covered || index > 0 && begin <= spans[index - 1].begin {
                return bad(format!(
                    "names tokens {begin}-{end} after tokens that begin or end later: sort the classes by their tokens"
                ));
            }
            if index > 1 && begin < spans[index - 2].end(tokens) {
                return bad(format!("names three classes for token {begin}, expected at most two, which blend"));
            }
            covered = end;
        }
        if covered < tokens {
            return bad(format!("leaves tokens {covered} to {} without a class", tokens - 1));
        }
        Ok(())
    }

    /// These classes, with those of `next` from token `first` on, and that token. If one class fades into another at
    /// token `first`, the classes change after the last token that both share, so that no token before the change gets
    /// another condition. `None` if the image of `tokens` tokens has no such token.
    pub fn followed_by(&self, next: &Self, first: usize, tokens: usize) -> Option<(Self, usize)> {
        let spans = |schedule: &Self| match schedule {
            Self::Constant(class) => vec![ClassSpan { class: *class, begin: 0, end: None }],
            Self::Spans(spans) => spans.clone(),
        };
        let (own, next) = (spans(self), spans(next));
        let ends_of_fades = own.windows(2).map(|pair| pair[1].begin..pair[0].end(tokens));
        let first = ends_of_fades.filter(|fade| fade.contains(&first)).map(|fade| fade.end).max().unwrap_or(first);
        if first >= tokens {
            return None;
        }
        let before = own.into_iter().filter(|span| span.begin < first);
        let before = before.map(|span| ClassSpan { end: Some(span.end(tokens).min(first)), ..span });
        let after = next.into_iter().filter(|span| span.end(tokens) > first);
        let after = after.map(|span| ClassSpan { begin: span.begin.max(first), ..span });
        Some((Self::Spans(before.chain(after).collect()), first))
    }

    /// Condition of token `index`; `none` is the unconditional label. Where two classes share n tokens, the share of
    /// the second is 1/(n+1) at the first of these tokens, and grows by 1/(n+1) with each token.
    pub fn condition(&self, index: usize, none: usize) -> ClassMix {
        let label = |class: Option<usize>| class.unwrap_or(none) as i64;
        let spans = match self {
            Self::Constant(class) => return ClassMix::of(label(*class)),
            Self::Spans(spans) => spans,
        };
        let at = spans.iter().rposition(|span| span.begin <= index).unwrap_or(0);
        let (before, here) = (at.checked_sub(1).map(|before| &spans[before]), &spans[at]);
        match before.and_then(|before| Some((before, before.end?))) {
            Some((before, end)) if index < end => {
                let share = (index - here.begin + 1) as f32 / (end - here.begin + 1) as f32;
                ClassMix { label: label(before.class), blend: Some((label(here.class), share)) }
            }
            _ => ClassMix::of(label(here.class)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(spans: &[(usize, usize, Option<usize>)]) -> ClassSchedule {
        let span = |&(class, begin, end)| ClassSpan { class: Some(class), begin, end };
        ClassSchedule::Spans(spans.iter().map(span).collect())
    }

    #[test]
    fn classes_follow_each_other() {
        let label = spans(&[(3, 0, Some(4)), (5, 4, None)]);
        label.check(8).unwrap();
        let found: Vec<ClassMix> = (0..8).map(|index| label.condition(index, 9)).collect();
        assert_eq!(found, [3, 3, 3, 3, 5, 5, 5, 5].map(ClassMix::of));
        assert_eq!(ClassSchedule::Constant(None).condition(7, 9), ClassMix::of(9));
    }

    #[test]
    fn classes_that_share_tokens_fade() {
        let label = spans(&[(3, 0, Some(5)), (5, 2, Some(8)), (6, 8, None)]);
        label.check(10).unwrap();
        let blend = |share| ClassMix { label: 3, blend: Some((5, share)) };
        let found: Vec<ClassMix> = (1..6).map(|index| label.condition(index, 9)).collect();
        assert_eq!(found, [ClassMix::of(3), blend(0.25), blend(0.5), blend(0.75), ClassMix::of(5)]);
        assert_eq!([7, 8].map(|index| label.condition(index, 9)), [5, 6].map(ClassMix::of));
    }

    #[test]
    fn tokens_without_a_class_and_with_too_many_are_named() {
        let problem = |label: ClassSchedule| label.check(10).unwrap_err().to_string();
        assert!(problem(spans(&[(0, 1, None)])).contains("tokens 0 to 0 without"));
        assert!(problem(spans(&[(0, 0, Some(3)), (1, 5, None)])).contains("tokens 3 to 4 without"));
        assert!(problem(spans(&[(0, 0, Some(9))])).contains("tokens 9 to 9 without"));
        assert!(
            problem(spans(&[(0, 0, Some(10)), (1, 10, None)]))
                .contains("names tokens 10-, but the image has 10 tokens")
        );
        assert!(problem(spans(&[(0, 0, Some(11))])).contains("names tokens 0-11, but"));
        assert!(problem(spans(&[(0, 0, Some(8)), (1, 2, Some(5)), (2, 5, None)])).contains("sort the classes"));
        assert!(problem(spans(&[(0, 0, None), (1, 5, None)])).contains("sort the classes"));
        assert!(problem(spans(&[(0, 0, Some(5)), (1, 2, Some(8)), (2, 4, None)])).contains("three classes"));
        assert!(problem(spans(&[(0, 0, Some(5)), (1, 0, None)])).contains("sort the classes"));
        assert!(problem(ClassSchedule::Spans(vec![])).contains("tokens 0 to 9 without"));
    }

    #[test]
    fn labels_are_read_as_they_are_written() {
        for label in
            [ClassSchedule::Constant(None), ClassSchedule::Constant(Some(3)), spans(&[(1, 0, Some(4)), (2, 3, None)])]
        {
            let text = serde_json::to_string(&label).unwrap();
            assert_eq!(serde_json::from_str::<ClassSchedule>(&text).unwrap(), label, "{text}");
        }
    }
}
