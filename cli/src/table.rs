//! Tables for reports, as text and in Markdown.

use comfy_table::{CellAlignment, Table, presets};

/// Formats a table as text. The first column is aligned to the left. The other columns hold numbers and are aligned to
/// the right.
pub fn text(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = filled(head, rows);
    table.load_preset(presets::NOTHING);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((if index == 0 { 0 } else { 2 }, 0));
    }
    table.trim_fmt()
}

/// Formats a table in Markdown.
pub fn markdown(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = filled(head, rows);
    table.load_preset(presets::ASCII_MARKDOWN);
    table.trim_fmt()
}

fn filled(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.set_header(head).add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    fn rows() -> Vec<Vec<String>> {
        vec![vec!["decoder".into(), "1.25".into(), "×".into()], vec!["flow".into(), "10.5".into()]]
    }

    #[test]
    fn numbers_are_aligned_to_the_right() {
        let table = ["stage      ms", "decoder  1.25  ×", "flow     10.5"];
        assert_eq!(super::text(&["stage", "ms", ""], rows()), table.join("\n"));
    }

    #[test]
    fn markdown_has_a_rule_below_its_head() {
        insta::assert_snapshot!(super::markdown(&["stage", "ms", ""], rows()));
    }
}
