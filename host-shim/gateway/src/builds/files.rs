//! Files that steps copy, as clients send them: an archive for each hash, kept for the team's later builds.
//!
//! ```text
//! GET  /templates/{id}/files/{hash}            is it there? where to send it: a signed address, good for an hour
//! PUT  /uploads/{team}/{hash}?expires&signature   no key: whoever has the address may send that one file
//!        │ into .part-…, counted, synced, then renamed: a file is whole or absent
//! uploads/<team>/<hash>  ──hard link──►  builds/<build>/files/<hash>    what a build has begun with stays with it
//! ```
//!
//! The hash is the client's name for what it sends (E2B's clients make it of paths, modes and contents, and of no archive), so
//! it cannot be held against the bytes; a `Content-Digest` (RFC 9530) is, where one is sent. A team never reaches another's.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::request::is_hash;
use crate::ApiError;
use crate::identity::{TeamId, hex, random, same};

/// How long an address is good for: the clients give up an upload after an hour.
const ADDRESS_LIFE: Duration = Duration::from_secs(2 * 3600);

/// Silence after which an upload is given up.
const SILENCE: Duration = Duration::from_secs(60);

/// Files of a team. A small one takes a block of the disk, and a place in its folder.
const MAX_FILES: usize = 10_000;

/// A file that was sent or asked for as recently does not make room for another: its build may be about to begin.
const IN_USE: Duration = Duration::from_secs(3600);

/// What a file is called before it is whole.
const PART: &str = ".part-";

/// What uploads are signed with, in the folder of uploads.
const KEY_FILE: &str = "key";

/// Files that clients sent.
#[derive(Debug)]
pub struct Uploads {
    root: PathBuf,
    key: [u8; 32],
    /// Bytes that are on their way, for each team.
    sending: Mutex<HashMap<TeamId, u64>>,
}

/// Where a file is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Seconds since 1970 until which it is good.
    pub expires: i64,
    /// That it is ours.
    pub signature: String,
}

impl Uploads {
    /// Opens the folder. What was being sent when a gateway was killed is removed.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&root)?;
        for team in fs::read_dir(&root)? {
            let team = team?;
            if !team.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(team.path())? {
                let file = file?;
                if file.file_name().as_encoded_bytes().starts_with(PART.as_bytes()) {
                    fs::remove_file(file.path())?;
                }
            }
        }
        let key = key(&root.join(KEY_FILE))?;
        Ok(Self { root, key, sending: Mutex::default() })
    }

    /// Whether the team has that file. One that is asked for is in use.
    pub async fn has(&self, team: &TeamId, hash: &str) -> io::Result<bool> {
        let path = self.path(team, hash);
        let touch = move || match fs::File::options().write(true).open(path) {
            Ok(file) => file.set_modified(SystemTime::now()).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        };
        tokio::task::spawn_blocking(touch).await.map_err(io::Error::other)?
    }

    /// Where the team may send that file.
    pub fn address(&self, team: &TeamId, hash: &str) -> Address {
        let life = i64::try_from(ADDRESS_LIFE.as_secs()).unwrap_or(i64::MAX);
        let expires = Timestamp::now().as_second().saturating_add(life);
        Address { expires, signature: self.sign(team, hash, expires) }
    }

    /// Whether that is an address of ours, for that file.
    pub fn check(&self, team: &str, hash: &str, address: &Address) -> Result<TeamId, ApiError> {
        let team = TeamId(team.to_owned());
        let refused = |why: &str| {
            ApiError::new(StatusCode::FORBIDDEN, format!("the upload's address {why}: ask for a new one"))
        };
        if !is_hash(hash) || !same(&self.sign(&team, hash, address.expires), &address.signature) {
            return Err(refused("was not given by this gateway for this file"));
        }
        if address.expires < Timestamp::now().as_second() {
            return Err(refused("has expired"));
        }
        Ok(team)
    }

    /// A digest that only this gateway can make. The inner one hides the key from whoever would extend the message.
    fn sign(&self, team: &TeamId, hash: &str, expires: i64) -> String {
        let inner = Sha256::new()
            .chain_update(self.key)
            .chain_update(format!("{team}\n{hash}\n{expires}"))
            .finalize();
        hex(&Sha256::new().chain_update(self.key).chain_update(inner).finalize())
    }

    fn path(&self, team: &TeamId, hash: &str) -> PathBuf {
        self.root.join(&team.0).join(hash)
    }

    /// Takes a file in, and puts it in its place when all of it is on the disk.
    pub async fn receive(
        &self,
        team: &TeamId,
        hash: &str,
        body: Body,
        expected: Expected,
        limit: u64,
    ) -> Result<(), ApiError> {
        let Expected { length, digest } = expected;
        let _sending = self.reserve(team, length, limit).await?;
        let folder = self.root.join(&team.0);
        let part = Part(folder.join(format!("{PART}{}", hex(&random::<8>().map_err(ApiError::internal)?))));
        let file = tokio::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&part.0).await;
        let mut file = file.map_err(did_not_fit)?;
        let mut hasher = digest.is_some().then(Sha256::new);
        let mut stream = body.into_data_stream();
        let mut got = 0;
        loop {
            let next = tokio::time::timeout(SILENCE, stream.next()).await.map_err(|_| {
                let message = format!("nothing of the upload came for {} s", SILENCE.as_secs());
                ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
            })?;
            let Some(bytes) = next else { break };
            let bytes =
                bytes.map_err(|error| ApiError::bad_request(format!("the upload broke off: {error}")))?;
            got += bytes.len() as u64;
            if got > length {
                break;
            }
            if let Some(hasher) = &mut hasher {
                hasher.update(&bytes);
            }
            file.write_all(&bytes).await.map_err(did_not_fit)?;
        }
        if got != length {
            return Err(ApiError::bad_request(format!("the upload has {got} bytes, expected {length}")));
        }
        if let (Some(hasher), Some(expected)) = (hasher, digest) {
            let found = hasher.finalize();
            if found[..] != expected[..] {
                let message = format!(
                    "the upload has the digest sha256:{}, expected sha256:{}",
                    hex(&found),
                    hex(&expected)
                );
                return Err(ApiError::bad_request(message));
            }
        }
        file.flush().await.map_err(did_not_fit)?;
        file.sync_all().await.map_err(did_not_fit)?;
        let (from, to) = (part.0.clone(), folder.join(hash));
        let place = move || {
            fs::rename(from, to)?;
            fs::File::open(folder)?.sync_all()
        };
        tokio::task::spawn_blocking(place).await.map_err(ApiError::internal)?.map_err(did_not_fit)
    }

    /// Keeps room for a file that is about to come, if need be that of files that were not used for the longest time.
    async fn reserve(&self, team: &TeamId, length: u64, limit: u64) -> Result<Sending<'_>, ApiError> {
        let too_much = |detail: String| ApiError::new(StatusCode::INSUFFICIENT_STORAGE, detail);
        if length > limit {
            let message =
                format!("the upload has {length} bytes, the team's uploads may have {limit} together");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        let before = {
            let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = sending.entry(team.clone()).or_default();
            let before = *bytes;
            *bytes = before.saturating_add(length);
            before
        };
        let reserved = Sending { uploads: self, team: team.clone(), length };
        let (folder, need) = (self.root.join(&team.0), before.saturating_add(length));
        let made = tokio::task::spawn_blocking(move || make_room(&folder, need, limit)).await;
        match made.map_err(ApiError::internal)?.map_err(did_not_fit)? {
            true => Ok(reserved),
            false => Err(too_much(format!(
                "the team's uploads of the last hour and this one ({length} bytes) have more than {limit} bytes: try again later, \
                 or ask the operator for more (tiffin-gateway teams builds)"
            ))),
        }
    }

    /// Gives a build the files that it needs. The hash of the first that is not there.
    pub(super) fn link(&self, team: &TeamId, hashes: &[String], into: &Path) -> io::Result<Option<String>> {
        fs::create_dir_all(into)?;
        for hash in hashes {
            match fs::hard_link(self.path(team, hash), into.join(hash)) {
                Ok(()) => {}
                // Two steps copy the same.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(hash.clone())),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// What an upload says of itself.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its bytes.
    pub length: u64,
    /// Their SHA-256, where it is said.
    pub digest: Option<Vec<u8>>,
}

impl Expected {
    /// Reads the headers of an upload.
    pub fn read(headers: &axum::http::HeaderMap) -> Result<Self, ApiError> {
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let length = text("content-length").and_then(|length| length.parse().ok()).ok_or_else(|| {
            ApiError::new(
                StatusCode::LENGTH_REQUIRED,
                "expected a Content-Length with the bytes of the upload",
            )
        })?;
        let bad = || ApiError::bad_request("Content-Digest: expected sha-256=:BASE64: with 32 bytes");
        let digest = match text("content-digest") {
            None => None,
            Some(value) => {
                // Others than this algorithm may stand beside it.
                let named = value.split(',').find_map(|one| one.trim().strip_prefix("sha-256="));
                let encoded = named
                    .and_then(|text| text.trim().strip_prefix(':')?.strip_suffix(':'))
                    .ok_or_else(bad)?;
                Some(STANDARD.decode(encoded).ok().filter(|bytes| bytes.len() == 32).ok_or_else(bad)?)
            }
        };
        Ok(Self { length, digest })
    }
}

/// Bytes on their way, until it is dropped.
struct Sending<'a> {
    uploads: &'a Uploads,
    team: TeamId,
    length: u64,
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let mut sending = self.uploads.sending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = sending.get_mut(&self.team) {
            *bytes = bytes.saturating_sub(self.length);
            if *bytes == 0 {
                sending.remove(&self.team);
            }
        }
    }
}

/// A file that is not whole; removed where it has not been renamed.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Removes files that were not used for the longest time until `need` more bytes fit; whether they do.
fn make_room(folder: &Path, need: u64, limit: u64) -> io::Result<bool> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let mut files = Vec::new();
    let mut used = 0;
    for file in fs::read_dir(folder)? {
        let file = file?;
        // What is on its way was counted when it began.
        if file.file_name().as_encoded_bytes().starts_with(PART.as_bytes()) {
            continue;
        }
        let metadata = file.metadata()?;
        used += metadata.len();
        files.push((metadata.modified()?, metadata.len(), file.path()));
    }
    let mut count = files.len();
    files.sort();
    let now = SystemTime::now();
    for (modified, length, path) in files {
        if used.saturating_add(need) <= limit && count < MAX_FILES {
            return Ok(true);
        }
        if now.duration_since(modified).is_ok_and(|age| age < IN_USE) {
            return Ok(false);
        }
        fs::remove_file(path)?;
        used -= length;
        count -= 1;
    }
    Ok(used.saturating_add(need) <= limit)
}

fn did_not_fit(error: io::Error) -> ApiError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            tracing::error!(%error, "an upload does not fit on the disk");
            let message = "the gateway's disk is full: try again when its operator has made room";
            ApiError::new(StatusCode::INSUFFICIENT_STORAGE, message)
        }
        _ => ApiError::internal(format!("an upload: {error}")),
    }
}

/// The key of signatures: made once, so that an address outlives the gateway that gave it.
fn key(path: &Path) -> io::Result<[u8; 32]> {
    if let Ok(bytes) = fs::read(path)
        && let Ok(key) = bytes.try_into()
    {
        return Ok(key);
    }
    let key = random::<32>()?;
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let mut file = fs::File::options().create_new(true).write(true).mode(0o600).open(&fresh)?;
    io::Write::write_all(&mut file, &key)?;
    file.sync_all()?;
    fs::rename(fresh, path)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1000;

    struct Sent {
        dir: tempfile::TempDir,
        uploads: Uploads,
        team: TeamId,
    }

    fn uploads() -> Sent {
        let dir = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(dir.path().join("uploads")).unwrap();
        Sent { dir, uploads, team: TeamId("aa".into()) }
    }

    fn hash(digit: char) -> String {
        digit.to_string().repeat(64)
    }

    impl Sent {
        async fn send(&self, digit: char, bytes: &[u8], expected: Expected) -> Result<(), ApiError> {
            let body = Body::from(bytes.to_vec());
            self.uploads.receive(&self.team, &hash(digit), body, expected, LIMIT).await
        }

        fn age(&self, digit: char) {
            let file =
                fs::File::options().write(true).open(self.uploads.path(&self.team, &hash(digit))).unwrap();
            file.set_modified(SystemTime::now() - 2 * IN_USE).unwrap();
        }

        fn files(&self) -> Vec<String> {
            let files = fs::read_dir(self.uploads.root.join("aa")).unwrap();
            let mut names: Vec<String> =
                files.map(|file| file.unwrap().file_name().into_string().unwrap()[..1].to_owned()).collect();
            names.sort();
            names
        }
    }

    fn of(length: u64) -> Expected {
        Expected { length, digest: None }
    }

    #[tokio::test]
    async fn a_file_is_whole_or_absent() {
        let sent = uploads();
        assert!(!sent.uploads.has(&sent.team, &hash('a')).await.unwrap());
        sent.send('a', b"contents", of(8)).await.unwrap();
        assert!(sent.uploads.has(&sent.team, &hash('a')).await.unwrap());
        assert!(!sent.uploads.has(&TeamId("bb".into()), &hash('a')).await.unwrap());

        let digest = |bytes: &[u8]| Some(Sha256::digest(bytes).to_vec());
        sent.send('b', b"right", Expected { length: 5, digest: digest(b"right") }).await.unwrap();
        let wrong =
            sent.send('c', b"wrong", Expected { length: 5, digest: digest(b"right") }).await.unwrap_err();
        assert!(wrong.message.contains("expected sha256:"), "{wrong}");
        for (bytes, length) in [(&b"short"[..], 6), (b"longer", 5)] {
            let error = sent.send('c', bytes, of(length)).await.unwrap_err();
            assert_eq!(error.status, StatusCode::BAD_REQUEST);
        }
        let broken = futures::stream::iter([Ok("half"), Err(io::Error::other("gone"))]);
        let error =
            sent.uploads.receive(&sent.team, &hash('c'), Body::from_stream(broken), of(8), LIMIT).await;
        assert!(error.unwrap_err().message.contains("broke off"));
        assert_eq!(sent.files(), ["a", "b"], "nothing is left of what failed");
        assert!(sent.uploads.sending.lock().unwrap().is_empty());

        // Killed while a file came.
        fs::write(sent.uploads.root.join("aa/.part-x"), "half").unwrap();
        let again = Uploads::open(sent.dir.path().join("uploads")).unwrap();
        assert_eq!(sent.files(), ["a", "b"]);
        let address = sent.uploads.address(&sent.team, &hash('c'));
        assert_eq!(again.check("aa", &hash('c'), &address).unwrap(), sent.team, "the key is kept");
    }

    #[tokio::test]
    async fn what_was_not_used_for_long_makes_room() {
        let sent = uploads();
        for digit in ['a', 'b'] {
            sent.send(digit, &[0; 400], of(400)).await.unwrap();
        }
        let full = sent.send('c', &[0; 400], of(400)).await.unwrap_err();
        assert_eq!(full.status, StatusCode::INSUFFICIENT_STORAGE, "both may be needed at once");
        sent.age('a');
        sent.send('c', &[0; 400], of(400)).await.unwrap();
        assert_eq!(sent.files(), ["b", "c"]);
        sent.age('b');
        assert!(sent.uploads.has(&sent.team, &hash('b')).await.unwrap());
        assert!(sent.send('d', &[0; 400], of(400)).await.is_err(), "b was just asked for");
        let large = sent.send('e', &[0; 10], of(LIMIT + 1)).await.unwrap_err();
        assert_eq!(large.status, StatusCode::PAYLOAD_TOO_LARGE);

        // What comes at the same time counts too.
        let one = sent.uploads.reserve(&sent.team, 200, LIMIT).await.unwrap();
        assert!(sent.uploads.reserve(&sent.team, 200, LIMIT).await.is_err());
        drop(one);
        drop(sent.uploads.reserve(&sent.team, 200, LIMIT).await.unwrap());
    }

    #[tokio::test]
    async fn a_build_keeps_what_it_has_begun_with() {
        let sent = uploads();
        sent.send('a', b"first", of(5)).await.unwrap();
        let folder = sent.dir.path().join("build/files");
        let hashes = [hash('a'), hash('a')];
        assert_eq!(sent.uploads.link(&sent.team, &hashes, &folder).unwrap(), None);
        assert_eq!(sent.uploads.link(&sent.team, &[hash('b')], &folder).unwrap(), Some(hash('b')));
        sent.send('a', b"other", of(5)).await.unwrap();
        assert_eq!(fs::read(folder.join(hash('a'))).unwrap(), b"first");
    }

    #[test]
    fn an_address_is_for_one_file_of_one_team() {
        let sent = uploads();
        let address = sent.uploads.address(&sent.team, &hash('a'));
        assert!(sent.uploads.check("aa", &hash('a'), &address).is_ok());
        let later = Address { expires: address.expires + 1, ..address.clone() };
        let unsigned = Address { signature: String::new(), ..address.clone() };
        for (team, file, address) in [
            ("aa", hash('b'), &address),
            ("bb", hash('a'), &address),
            ("aa", hash('a'), &later),
            ("aa", hash('a'), &unsigned),
            ("aa", "../../x".to_owned(), &address),
        ] {
            assert_eq!(sent.uploads.check(team, &file, address).unwrap_err().status, StatusCode::FORBIDDEN);
        }
        let old = Address { expires: 1, signature: sent.uploads.sign(&sent.team, &hash('a'), 1) };
        assert!(sent.uploads.check("aa", &hash('a'), &old).unwrap_err().message.contains("has expired"));
    }

    #[test]
    fn headers_are_read_or_refused() {
        let read = |pairs: &[(&'static str, &str)]| {
            let headers = pairs.iter().map(|(name, value)| {
                (axum::http::HeaderName::from_static(name), value.parse::<axum::http::HeaderValue>().unwrap())
            });
            Expected::read(&headers.collect())
        };
        assert_eq!(read(&[]).unwrap_err().status, StatusCode::LENGTH_REQUIRED);
        assert_eq!(read(&[("content-length", "7")]).unwrap().digest, None);
        let digest = format!("md5=:x:, sha-256=:{}:", STANDARD.encode([7; 32]));
        assert_eq!(
            read(&[("content-length", "7"), ("content-digest", &digest)]).unwrap().digest,
            Some(vec![7; 32])
        );
        for bad in ["sha-256=:AAAA:", "sha-512=:AAAA:", "x"] {
            assert!(read(&[("content-length", "7"), ("content-digest", bad)]).is_err(), "{bad}");
        }
    }
}
