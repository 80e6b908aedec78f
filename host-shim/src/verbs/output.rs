//! What verbs print.

use std::io::{self, Write};

use serde::Serialize;

use super::error::Error;

/// Prints text and what is still in the buffer.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("write", "stdout"))
}

/// Prints a line.
pub(crate) fn line(text: &str) -> Result<(), Error> {
    print(&format!("{text}\n"))
}

/// Prints a value as a line of JSON.
pub(crate) fn json_line(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string(value).map_err(|error| Error::io("write", "JSON")(error.into()))?;
    line(&text)
}

/// Prints a value as JSON for people.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Error> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Error::io("write", "JSON")(error.into()))?;
    line(&text)
}

/// Columns with a heading, the last one as long as it is.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = heading.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut add = |cells: [&str; N]| {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    add(heading);
    for row in rows {
        add(row.each_ref().map(String::as_str));
    }
    text
}

/// Bytes as people read them.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes}B") } else { format!("{value:.1}{}", UNITS[unit]) }
}

/// How long ago something was, in its largest unit.
pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_sizes_and_ages_are_for_people() {
        let rows = [["1".to_owned(), "é".to_owned(), String::new()], ["22".into(), "bb".into(), "x".into()]];
        assert_eq!(table(["ID", "N", "LABELS"], &rows), "ID   N    LABELS\n1    é\n22   bb   x\n");
        assert_eq!([0, 1023, 1024, 5 << 30].map(size), ["0B", "1023B", "1.0KiB", "5.0GiB"]);
        assert_eq!([0, 119, 120, 7200, 172_800].map(age), ["0s", "119s", "2m", "2h", "2d"]);
    }
}
