//! From what a client calls a template to its folder.

use axum::http::StatusCode;
use template::{DataDir, TemplateFolder, TemplateName};

use crate::ApiError;
use crate::builds::{self, Wanted};
use crate::config::Config;
use crate::store::{Store, Team};

/// The tag of a template that has no other: those of the machine have this one alone.
const DEFAULT_TAG: &str = builds::DEFAULT_TAG;

/// A template that a team may start.
#[derive(Debug)]
pub(crate) struct Found {
    /// Its id: that of a team's, the name of the machine's.
    pub(crate) id: String,
    /// What it is called.
    pub(crate) alias: String,
    /// Where it is.
    pub(crate) folder: TemplateFolder,
}

/// Finds the template that a team's client calls `NAME`, `NAME:TAG` or by its id: the team's own, else the machine's. One that
/// is missing on this machine is fetched from the registry, where there is one.
pub(crate) async fn find(
    config: &Config,
    store: &Store,
    team: &Team,
    wanted: &str,
) -> Result<Found, ApiError> {
    let own = match Wanted::parse(team, wanted) {
        Some(wanted) => store.tagged(&team.id, wanted.name.as_str(), wanted.tag()).await?,
        None => None,
    };
    let Some((template, build)) = own else {
        let (data, wanted) = (config.data.clone(), wanted.to_owned());
        let found = tokio::task::spawn_blocking(move || of_machine(&data, &wanted)).await;
        let (name, folder) = found.map_err(ApiError::internal)??;
        return Ok(Found { id: name.to_string(), alias: name.to_string(), folder });
    };
    let path = config.data.templates().join(builds::folder(&template.id, &build.id));
    let open = || {
        let path = path.clone();
        tokio::task::spawn_blocking(move || TemplateFolder::open(&path))
    };
    let folder = match open().await.map_err(ApiError::internal)? {
        Err(template::Error::Missing { .. }) => {
            builds::fetch(config, &build).await?;
            open().await.map_err(ApiError::internal)?.map_err(ApiError::internal)?
        }
        other => other.map_err(ApiError::internal)?,
    };
    Ok(Found { id: template.id.to_string(), alias: template.name.to_string(), folder })
}

/// Finds the machine's template that a client calls `NAME` or `NAME:default`. A build's folder is no name of it.
pub(crate) fn of_machine(data: &DataDir, wanted: &str) -> Result<(TemplateName, TemplateFolder), ApiError> {
    let unknown = || ApiError::new(StatusCode::NOT_FOUND, format!("Template {wanted:?} not found"));
    let (name, tag) = wanted.split_once(':').unwrap_or((wanted, DEFAULT_TAG));
    let name: TemplateName = name.parse().map_err(|_| unknown())?;
    if tag != DEFAULT_TAG || builds::of_folder(name.as_str()).is_some() {
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
        let build = "0123456789abcdef0123.01234567-89ab-cdef-0123-456789abcdef";
        std::fs::create_dir_all(data.templates().join(build)).unwrap();
        std::fs::write(data.templates().join(build).join(template::TEMPLATE_FILE), "{}").unwrap();
        for name in ["", "none", "../x", "/etc", "base:v2", "a/b", "a:b:c", ".new-x", "BASE", build] {
            let error = of_machine(&data, name).unwrap_err();
            assert_eq!((error.status.as_u16(), error.message), (404, format!("Template {name:?} not found")));
        }
    }
}
