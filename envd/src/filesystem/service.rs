//! `filesystem.Filesystem` on the client door.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use envd_channel::name;
use envd_proto::filesystem::{
    ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest, MoveResponse,
    RemoveRequest, RemoveResponse, StatRequest, StatResponse,
};
use http::HeaderMap;

use super::operations::{self, Owner, io_error, owner};
use super::watch::Watchers;
use super::{list, relocate, remove};
use crate::connect::{Code, Error};
use crate::sandbox::{Sandbox, Session};
use crate::users::User;

/// Answers the calls of `filesystem.Filesystem`.
#[derive(Clone, Debug)]
pub struct FilesystemService {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) watchers: Watchers,
}

impl FilesystemService {
    /// A service for the files of `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox, watchers: Watchers::default() }
    }

    /// What is at a path.
    pub async fn stat(
        &self,
        session: &Session,
        r: StatRequest,
        headers: &HeaderMap,
    ) -> Result<StatResponse, Error> {
        let (user, users) = session.caller(&self.sandbox, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        let stat = if r.exact { operations::exact_stat } else { operations::stat };
        let entry = self.run(&path.clone(), move || stat(&path, &users)).await?;
        Ok(StatResponse { entry: Some(entry) })
    }

    /// What is below a directory.
    pub async fn list_dir(
        &self,
        session: &Session,
        r: ListDirRequest,
        headers: &HeaderMap,
    ) -> Result<ListDirResponse, Error> {
        let (user, users) = session.caller(&self.sandbox, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        let wish = list::Wish::parse(&r)?;
        let entries = self.run(&path.clone(), move || list::list(&path, &wish, &users)).await?;
        Ok(ListDirResponse { entries })
    }

    /// Makes a directory and those above it.
    pub async fn make_dir(
        &self,
        session: &Session,
        r: MakeDirRequest,
        headers: &HeaderMap,
    ) -> Result<MakeDirResponse, Error> {
        let (user, users) = session.caller(&self.sandbox, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        let owner = self.owner(&user);
        let entry = self.run(&path.clone(), move || operations::make_directory(&path, owner, &users)).await?;
        Ok(MakeDirResponse { entry: Some(entry) })
    }

    /// Gives a file another path.
    pub async fn rename(
        &self,
        session: &Session,
        r: MoveRequest,
        headers: &HeaderMap,
    ) -> Result<MoveResponse, Error> {
        let (user, users) = session.caller(&self.sandbox, headers).await?;
        let from = absolute(session, &user, &r.source)?;
        let to = absolute(session, &user, &r.destination)?;
        let owner = self.owner(&user);
        let entry = self.run(&from.clone(), move || relocate::relocate(&from, &to, owner, &users)).await?;
        Ok(MoveResponse { entry: Some(entry) })
    }

    /// Removes a file, or a directory with all that is in it.
    pub async fn remove(
        &self,
        session: &Session,
        r: RemoveRequest,
        headers: &HeaderMap,
    ) -> Result<RemoveResponse, Error> {
        let user = session.user(&self.sandbox, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        self.run(&path.clone(), move || remove::remove(&path)).await?;
        Ok(RemoveResponse {})
    }

    fn owner(&self, user: &User) -> Owner {
        owner(user, self.sandbox.can_change_user())
    }

    async fn run<T: Send + 'static>(
        &self,
        path: &Path,
        job: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.sandbox.root().run(move || Ok(job())).await;
        done.map_err(|error| io_error("no answer about", path, &error))?
    }
}

/// The absolute path that a client means, as the bytes that the kernel gets.
pub(super) fn absolute(session: &Session, user: &User, path: &str) -> Result<PathBuf, Error> {
    if path.contains('\0') {
        return Err(Error::new(Code::InvalidArgument, "the path holds a NUL byte, which no name can"));
    }
    Ok(name::decode(&session.path(user, path)?))
}
