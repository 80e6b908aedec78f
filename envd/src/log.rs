//! What the agent itself has to say.

use std::fmt;

/// Something that went wrong and that the agent can live with.
pub(crate) fn warn(text: fmt::Arguments<'_>) {
    line("warn", text);
}

/// Something that ends the agent, or a sandbox's use.
pub(crate) fn error(text: fmt::Arguments<'_>) {
    line("error", text);
}

fn line(level: &str, text: fmt::Arguments<'_>) {
    eprintln!("envd: {level}: {text}");
}
