//! `build --steps`: a template as E2B's clients send it, as the second front end of the plan.
//!
//! ```text
//! FILE --TemplateBuild::parse--> one stage of instructions      COPY --from=HASH for each step with files
//! DIR/HASH.tar.gz ------------> a context called HASH           fromTemplate ----> a context of its name, which is an image
//! startCmd, readyCmd ---------> labels, which template create reads
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use dockerfile::e2b::{TemplateBase, TemplateBuild};
use dockerfile::{Dockerfile, MAX_DOCKERFILE, Position, Reason};
use oci::ImageReference;
use template::{READY_LABEL, START_LABEL};

use crate::contexts::{Contexts, NamedContext};
use crate::error::{Error, at};

/// What the archive of a step's files may be called, behind its hash.
const ENDINGS: [&str; 3] = [".tar.gz", ".tar", ""];

/// The steps of a template, and what they name.
#[derive(Clone, Debug)]
pub struct StepsOptions {
    /// The request: `fromImage` or `fromTemplate`, and `steps`.
    pub file: PathBuf,
    /// The folder of the files that steps copy, by their hash.
    pub files: Option<PathBuf>,
    /// The images of templates.
    pub templates: BTreeMap<String, ImageReference>,
}

/// The steps as a Dockerfile, with the labels of the image. What they copy from is added to the contexts.
pub(crate) fn read(
    options: &StepsOptions,
    contexts: &mut Contexts,
) -> Result<(Dockerfile, BTreeMap<String, String>), Error> {
    let shown = options.file.display().to_string();
    let mut json = Vec::new();
    // One byte more than allowed: whoever parses it says that it is too long.
    let file = File::open(&options.file).map_err(at(&options.file))?;
    file.take(MAX_DOCKERFILE as u64 + 1).read_to_end(&mut json).map_err(at(&options.file))?;
    let build = TemplateBuild::parse(&shown, &json).map_err(|error| match *error.reason {
        // The whole request, whose lines are those of the file.
        Reason::Arguments { keyword: "template", .. } | Reason::TooMuch { .. } => Error::Dockerfile(error),
        _ => of_plan(true, error),
    })?;
    if let TemplateBase::Template(name) = &build.base {
        let image = options.templates.get(name).ok_or_else(|| Error::Invalid {
            what: format!("{shown}: fromTemplate {name:?}"),
            reason: format!("no image is known for it; name one with --template-image {name}=IMAGE"),
        })?;
        contexts.insert(name, NamedContext::Image(image.clone()));
    }
    for files in &build.files {
        let Some(hash) = &files.hash else { continue };
        let archive = find(options.files.as_deref(), hash).map_err(|source| Error::TemplateStep {
            file: shown.clone(),
            step: files.step,
            text: String::new(),
            source: Box::new(source),
        })?;
        contexts.insert(hash, NamedContext::Archive(archive));
    }
    let labels = [(START_LABEL, build.start_command), (READY_LABEL, build.ready_command)];
    let labels = labels.into_iter().filter_map(|(name, command)| Some((name.to_owned(), command?)));
    Ok((build.dockerfile, labels.collect()))
}

fn find(folder: Option<&Path>, hash: &str) -> Result<PathBuf, Error> {
    let missing = |reason: String| Error::Source { what: format!("files {hash}"), reason };
    let folder =
        folder.ok_or_else(|| missing("the step copies files: name their folder with --files".to_owned()))?;
    let known = ENDINGS.iter().map(|ending| folder.join(format!("{hash}{ending}")));
    known
        .into_iter()
        .find(|path| path.is_file())
        .ok_or_else(|| missing(format!("neither {hash}.tar.gz nor {hash}.tar is in {}", folder.display())))
}

/// The error of a step, whose number is the line of its statement.
pub(crate) fn at_step(file: &str, at: Position, text: &str, source: Error) -> Error {
    match source {
        Error::Dockerfile(error) => of_plan(true, error),
        source => {
            let (file, text) = (file.to_owned(), text.to_owned());
            Error::TemplateStep { file, step: at.line, text, source: Box::new(source) }
        }
    }
}

/// An error of the plan as one of a step, where there are steps.
pub(crate) fn of_plan(of_steps: bool, error: dockerfile::Error) -> Error {
    if !of_steps {
        return Error::Dockerfile(error);
    }
    let source = Error::Source { what: error.text.trim().to_owned(), reason: error.reason.to_string() };
    Error::TemplateStep {
        file: error.file,
        step: error.at.line,
        text: String::new(),
        source: Box::new(source),
    }
}
