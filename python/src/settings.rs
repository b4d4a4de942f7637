//! Keywords as settings of the library.

use eqim::request::settings::Settings;
use pyo3::exceptions::{PyOverflowError, PyUnicodeEncodeError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde_json::{Map, Number, Value};

use crate::error::{OrRaise, bad_input};
use crate::keywords::{KEYWORDS, keyword_of};

/// The settings that keywords set.
///
/// # Errors
/// `InputError` naming the keyword that is not a setting or whose value does not fit.
pub fn read(keywords: Option<&Bound<'_, PyDict>>) -> PyResult<Settings> {
    let Some(keywords) = keywords else { return Ok(Settings::default()) };
    let mut object = Map::new();
    // Pictures to continue are arguments of their own.
    let names: Vec<String> = Settings::names().into_iter().filter(|name| name != "prefix").collect();
    let known: Vec<&str> = names.iter().map(|name| keyword_of(name)).collect();
    for (keyword, given) in keywords {
        let keyword: String = keyword.extract()?;
        let setting = KEYWORDS.iter().find(|(known, _)| *known == keyword);
        if !known.contains(&keyword.as_str()) {
            let problem = format!("{keyword} is not a keyword, expected one of {}", known.join(", "));
            return Err(bad_input(keywords.py(), problem));
        }
        let value = value(&keyword, &given)?;
        if !value.is_null() {
            object.insert(setting.map_or(keyword.clone(), |(_, name)| (*name).to_string()), value);
        }
    }
    let renamed = |error: eqim::Error| {
        // Errors about a value begin with the name of its setting.
        let text = error.to_string();
        let keyword = KEYWORDS.iter().find(|(_, name)| text.strip_prefix(name).is_some_and(|it| it.starts_with(' ')));
        match keyword {
            Some((keyword, name)) => eqim::Error::input(keyword, text[name.len()..].trim_start()),
            None => error,
        }
    };
    Settings::from_json(object).map_err(renamed).or_raise(keywords.py())
}

/// An argument of a method.
///
/// # Errors
/// `InputError` if its type fits and its value does not: a number that is negative or too large, a string that is not Unicode;
/// `TypeError` for another type.
pub fn argument<'a, 'py, T>(given: &'a Bound<'py, PyAny>) -> PyResult<T>
where
    T: FromPyObject<'a, 'py>,
{
    let py = given.py();
    given.extract().map_err(|error: T::Error| {
        let error: PyErr = error.into();
        if error.is_instance_of::<PyOverflowError>(py) {
            return bad_input(py, format!("{given} is outside the range of 64-bit integers that are not negative"));
        }
        if error.is_instance_of::<PyUnicodeEncodeError>(py) {
            return bad_input(py, "a string is not valid Unicode");
        }
        error
    })
}

/// The value of a keyword in JSON.
///
/// # Errors
/// `InputError` naming the keyword if its type has no equivalent.
pub fn value(keyword: &str, given: &Bound<'_, PyAny>) -> PyResult<Value> {
    if given.is_instance_of::<PyTuple>() || given.is_instance_of::<PyList>() {
        let items = given.try_iter()?.map(|item| scalar(keyword, &item?));
        return Ok(Value::Array(items.collect::<PyResult<_>>()?));
    }
    scalar(keyword, given)
}

/// The value of a keyword, or of an item in its list. Lists have no lists, which could contain themselves.
fn scalar(keyword: &str, given: &Bound<'_, PyAny>) -> PyResult<Value> {
    let py = given.py();
    let bad = |problem: String| bad_input(py, format!("{keyword} is {problem}"));
    if given.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(flag) = given.cast::<PyBool>() {
        return Ok(flag.is_true().into());
    }
    if let Ok(text) = given.cast::<PyString>() {
        return text.to_str().map(Value::from).map_err(|_| bad("not a string of valid Unicode".into()));
    }
    // Scalars of NumPy.
    if given.hasattr("dtype")? && given.hasattr("item")? {
        let plain = given.call_method0("item")?;
        return if plain.hasattr("dtype")? { Err(bad("an array".into())) } else { scalar(keyword, &plain) };
    }
    if given.is_instance_of::<PyInt>() || given.hasattr("__index__")? {
        let number = given.call_method0("__index__")?;
        let unsigned = number.extract::<u64>().map(Number::from);
        let number = unsigned.or_else(|_| number.extract::<i64>().map(Number::from));
        return number.map(Value::Number).map_err(|_| bad("outside the range of 64-bit integers".into()));
    }
    if given.is_instance_of::<PyFloat>() || given.hasattr("__float__")? {
        let number: f64 = given.call_method0("__float__")?.extract()?;
        return Number::from_f64(number)
            .map(Value::Number)
            .ok_or_else(|| bad(format!("{number}, expected a finite number")));
    }
    if given.hasattr("__fspath__")? {
        return scalar(keyword, &py.import("os")?.call_method1("fspath", (given,))?);
    }
    Err(bad(format!("a {}, expected a number, a string or a list", given.get_type().name()?)))
}
