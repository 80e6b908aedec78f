//! From what a client calls a template to its folder.

use axum::http::StatusCode;
use template::{DataDir, TemplateFolder, TemplateName};

use crate::ApiError;

/// The tag of a template that has no other; the only one so far.
const DEFAULT_TAG: &str = "default";

/// Finds the template that a client calls `NAME` or `NAME:default`.
pub(crate) fn find(data: &DataDir, wanted: &str) -> Result<(TemplateName, TemplateFolder), ApiError> {
    let unknown = || ApiError::new(StatusCode::NOT_FOUND, format!("Template {wanted:?} not found"));
    let (name, tag) = wanted.split_once(':').unwrap_or((wanted, DEFAULT_TAG));
    let name: TemplateName = name.parse().map_err(|_| unknown())?;
    if tag != DEFAULT_TAG {
        return Err(unknown());
    }
    match TemplateFolder::open(&data.templates().join(name.as_str())) {
        Ok(folder) => Ok((name, folder)),
        Err(template::Error::Missing { .. }) => Err(unknown()),
        Err(error) => Err(ApiError::internal(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_name_of_a_template_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::resolve(Some(dir.path())).unwrap();
        for name in ["", "none", "../x", "/etc", "base:v2", "a/b", "a:b:c", ".new-x", "BASE"] {
            let error = find(&data, name).unwrap_err();
            assert_eq!((error.status.as_u16(), error.message), (404, format!("Template {name:?} not found")));
        }
    }
}
