//! `filesystem.Filesystem` on the client door.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use envd_proto::filesystem::{
    ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest, MoveResponse,
    RemoveRequest, RemoveResponse, StatRequest, StatResponse,
};
use http::HeaderMap;

use super::operations::{self, Owner, owner};
use crate::connect::{Code, Error};
use crate::sandbox::{Sandbox, Session};
use crate::users::{User, UserDatabase};

/// Answers the calls of `filesystem.Filesystem`.
#[derive(Clone, Debug)]
pub struct FilesystemService {
    sandbox: Arc<Sandbox>,
}

impl FilesystemService {
    /// A service for the files of `sandbox`.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self { sandbox }
    }

    /// What is at a path.
    pub async fn stat(
        &self,
        session: &Session,
        r: StatRequest,
        headers: &HeaderMap,
    ) -> Result<StatResponse, Error> {
        let (user, users) = self.caller(session, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        let entry = self.run(move || operations::stat(&path, &users)).await?;
        Ok(StatResponse { entry: Some(entry) })
    }

    /// What is below a directory.
    pub async fn list_dir(
        &self,
        session: &Session,
        r: ListDirRequest,
        headers: &HeaderMap,
    ) -> Result<ListDirResponse, Error> {
        let (user, users) = self.caller(session, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        let entries = self.run(move || operations::list(&path, r.depth, &users)).await?;
        Ok(ListDirResponse { entries })
    }

    /// Makes a directory and those above it.
    pub async fn make_dir(
        &self,
        session: &Session,
        r: MakeDirRequest,
        headers: &HeaderMap,
    ) -> Result<MakeDirResponse, Error> {
        let (user, users) = self.caller(session, headers).await?;
        let path = absolute(session, &user, &r.path)?;
        let owner = self.owner(&user);
        let entry = self.run(move || operations::make_directory(&path, owner, &users)).await?;
        Ok(MakeDirResponse { entry: Some(entry) })
    }

    /// Gives a file another path.
    pub async fn rename(
        &self,
        session: &Session,
        r: MoveRequest,
        headers: &HeaderMap,
    ) -> Result<MoveResponse, Error> {
        let (user, users) = self.caller(session, headers).await?;
        let from = absolute(session, &user, &r.source)?;
        let to = absolute(session, &user, &r.destination)?;
        let owner = self.owner(&user);
        let entry = self.run(move || operations::rename(&from, &to, owner, &users)).await?;
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
        self.run(move || operations::remove(&path)).await?;
        Ok(RemoveResponse {})
    }

    async fn caller(&self, session: &Session, headers: &HeaderMap) -> Result<(User, UserDatabase), Error> {
        let user = session.user(&self.sandbox, headers).await?;
        let users = UserDatabase::read(self.sandbox.root()).await.map_err(|error| internal(&error))?;
        Ok((user, users))
    }

    fn owner(&self, user: &User) -> Owner {
        owner(user, self.sandbox.can_change_user())
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.sandbox.root().run(move || Ok(job())).await.map_err(|error| internal(&error))?
    }
}

pub(super) fn absolute(session: &Session, user: &User, path: &str) -> Result<PathBuf, Error> {
    session.path(user, path).map(PathBuf::from)
}

fn internal(error: &io::Error) -> Error {
    Error::new(Code::Internal, error.to_string())
}
