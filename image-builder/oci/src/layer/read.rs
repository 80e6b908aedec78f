//! From a tar stream to changes.
//!
//! Headers are decoded by the `tar` crate; the walk from one to the next is here, because every length must be bounded
//! before it is believed and each file's offset is part of the result. What two readers could understand differently
//! (sizes on entries without data, sparse maps in global headers) is refused rather than guessed.

use std::io::{self, BufReader, Read, Seek};

use super::path::MAX_PATH;
use super::pax::{MAX_PAX_HEADER, Records};
use super::sparse::{self, SparseRecords};
use super::{Change, DataRun, Kind, LayerPath, Metadata, Node, OPAQUE, Timestamp, WHITEOUT};
use crate::Error;

/// The most entries of a layer: ten times the largest images seen, and a bound for the memory of whoever keeps them.
pub const MAX_ENTRIES: u64 = 4_000_000;
/// The unit of a tar stream.
const BLOCK: u64 = 512;

/// What an entry inherits from global headers counts as one entry more for every so many bytes: whoever keeps the entries
/// keeps it with each of them.
const INHERITED_BYTES: u64 = 128;

/// Reads the changes of an uncompressed layer. While the last change is a file, reading from the reader itself gives
/// the file's data (of a sparse one the runs, one behind the other); what is not read is skipped.
pub struct LayerReader<R> {
    inner: R,
    position: u64,
    data_left: u64,
    padding: u64,
    /// Entries so far, with what else takes as much memory as one.
    entries: u64,
    global: Records,
    ended: bool,
    /// Names that mark whiteouts in a layer are names here.
    plain: bool,
    skip: Skip<R>,
}

/// Moves over that many bytes; says how many there were.
type Skip<R> = fn(&mut R, u64) -> io::Result<u64>;

impl<R: Read + Seek> LayerReader<BufReader<R>> {
    /// As [`LayerReader::new`] for a stream that is not checked while it is read: data that nobody asks for is not read.
    pub fn seeking(inner: BufReader<R>) -> Self {
        Self::with_skip(inner, |inner, count| {
            // The last byte is read: seeking alone would go beyond the end without a word.
            let Some(before_last) = count.checked_sub(1) else { return Ok(0) };
            inner.seek_relative(i64::try_from(before_last).map_err(io::Error::other)?)?;
            Ok(match inner.read_exact(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => before_last,
                other => other.map(|()| count)?,
            })
        })
    }
}

impl<R: Read> LayerReader<R> {
    /// Reads from the beginning of a tar stream.
    pub fn new(inner: R) -> Self {
        Self::with_skip(inner, |inner, count| io::copy(&mut inner.take(count), &mut io::sink()))
    }

    fn with_skip(inner: R, skip: Skip<R>) -> Self {
        Self {
            inner,
            position: 0,
            data_left: 0,
            padding: 0,
            entries: 0,
            global: Records::default(),
            ended: false,
            plain: false,
            skip,
        }
    }

    /// Reads an archive that is no layer: a name that begins with `.wh.` is a name.
    pub fn plain(mut self) -> Self {
        self.plain = true;
        self
    }

    /// The next change; `None` at the end. By then the stream was read to its last byte, so that a reader below that
    /// checks a digest has done so.
    pub fn next_change(&mut self) -> Result<Option<Change>, Error> {
        let mut long_name: Option<Vec<u8>> = None;
        let mut long_link: Option<Vec<u8>> = None;
        let mut pax: Option<Records> = None;
        loop {
            let Some(header) = self.next_header()? else {
                if long_name.is_some() || long_link.is_some() || pax.is_some() {
                    return Err(self.corrupt("the stream ends after an extended header, before its entry"));
                }
                return Ok(None);
            };
            self.count(1)?;
            let size = header.entry_size().map_err(|error| self.corrupt(format!("entry size: {error}")))?;
            match header.entry_type().as_byte() {
                b'L' => {
                    self.extension(&mut long_name, "GNU long name", size, MAX_PATH as u64 + 1, trim_nul)?
                }
                b'K' => {
                    self.extension(&mut long_link, "GNU long link", size, MAX_PATH as u64 + 1, trim_nul)?
                }
                b'x' | b'X' => {
                    let mut raw = None;
                    self.extension(&mut raw, "PAX header", size, MAX_PAX_HEADER, |raw| raw)?;
                    if pax.replace(self.global.overlay(&raw.unwrap_or_default())?).is_some() {
                        return Err(self.corrupt("two PAX headers for one entry"));
                    }
                }
                b'g' => {
                    let mut raw = None;
                    self.extension(&mut raw, "global PAX header", size, MAX_PAX_HEADER, |raw| raw)?;
                    self.global = self.global.overlay(&raw.unwrap_or_default())?;
                    if self.global.sparse != SparseRecords::default() {
                        return Err(self.corrupt("a map of a sparse file in a global PAX header"));
                    }
                }
                // A volume label.
                b'V' => self.begin_data(size)?,
                kind => {
                    self.count(self.global.xattr_bytes() / INHERITED_BYTES)?;
                    let pax = pax.take().unwrap_or_else(|| self.global.clone());
                    let names = (long_name.take(), long_link.take());
                    if let Some(change) = self.change(&header, kind, size, names, pax)? {
                        return Ok(Some(change));
                    }
                }
            }
        }
    }

    fn count(&mut self, entries: u64) -> Result<(), Error> {
        self.entries += entries;
        match self.entries > MAX_ENTRIES {
            true => {
                Err(self.corrupt(format!("it has more than {MAX_ENTRIES} entries and parts of sparse files")))
            }
            false => Ok(()),
        }
    }

    fn change(
        &mut self,
        header: &tar::Header,
        kind: u8,
        size: u64,
        (long_name, long_link): (Option<Vec<u8>>, Option<Vec<u8>>),
        pax: Records,
    ) -> Result<Option<Change>, Error> {
        let sparse = pax.sparse;
        let raw = sparse
            .name
            .clone()
            .or(pax.path)
            .or(long_name)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let path = LayerPath::parse(&raw)?;
        let corrupt = |reason: String| Error::corrupt(format!("layer entry {path}"), reason);
        // Writers that have nothing to say leave a numeric field blank.
        let number = |name: &str, field: &[u8], value: io::Result<u64>| match value {
            Err(_) if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
            Err(error) => Err(corrupt(format!("{name}: {error}"))),
            Ok(value) => Ok(value),
        };
        let field = |name: &str, field: &[u8], value: io::Result<u64>| {
            let value = number(name, field, value)?;
            u32::try_from(value).map_err(|_| corrupt(format!("{name} {value} does not fit 32 bits")))
        };
        let size = pax.size.unwrap_or(size);
        let target =
            pax.linkpath.or(long_link).or_else(|| header.link_name_bytes().map(|name| name.into_owned()));
        let device = || {
            let number = |value: io::Result<Option<u32>>| {
                value
                    .map(Option::unwrap_or_default)
                    .map_err(|error| corrupt(format!("device number: {error}")))
            };
            Ok::<_, Error>((number(header.device_major())?, number(header.device_minor())?))
        };
        let type_flag = kind;
        // Old tar has no type for directories, only a slash at the end of the name.
        let directory = kind == b'5' || (matches!(kind, 0 | b'0') && raw.ends_with(b"/"));
        let kind = match kind {
            _ if directory => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File { size, offset: self.position },
            b'1' => match target {
                Some(target) => Kind::HardLink(LayerPath::parse(&target)?),
                None => return Err(corrupt("a hard link without a target".to_owned())),
            },
            b'2' => match target {
                Some(target) if !target.contains(&0) && target.len() <= MAX_PATH => Kind::Symlink(target),
                Some(_) => {
                    return Err(corrupt(format!(
                        "the link's target must be 1 to {MAX_PATH} bytes without NUL"
                    )));
                }
                None => return Err(corrupt("a symbolic link without a target".to_owned())),
            },
            b'3' => device().map(|(major, minor)| Kind::CharDevice { major, minor })?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            b'6' => Kind::Fifo,
            other => {
                return Err(Error::unsupported(
                    format!("layer entry {path}"),
                    format!("its tar type is {:?}", char::from(other)),
                ));
            }
        };
        if !matches!(kind, Kind::File { .. }) && size != 0 {
            return Err(corrupt(format!("it holds no data but says that it has {size} bytes")));
        }
        if path.is_root() && kind != Kind::Directory {
            return Err(corrupt("it would replace the root directory".to_owned()));
        }
        let kind = match kind {
            Kind::File { .. } if type_flag == b'S' => self.old_sparse(header, size, &path)?,
            Kind::File { .. } if sparse != SparseRecords::default() => self.sparse(sparse, size, &path)?,
            kind => {
                self.begin_data(size)?;
                kind
            }
        };

        if let Some((parent, name)) = path.split().filter(|_| !self.plain) {
            if name == OPAQUE {
                return Ok(Some(Change::Opaque(parent)));
            }
            if let Some(hidden) = name.strip_prefix(WHITEOUT) {
                // aufs' own bookkeeping, left in old Docker layers.
                if hidden.starts_with(WHITEOUT) {
                    return Ok(None);
                }
                if matches!(hidden, b"" | b"." | b"..") {
                    return Err(corrupt("a whiteout of nothing".to_owned()));
                }
                return parent.join(hidden).map(|path| Some(Change::Whiteout(path)));
            }
        }
        let raw = header.as_old();
        let seconds = number("mtime", &raw.mtime, header.mtime())?;
        let metadata = Metadata {
            mode: field("mode", &raw.mode, header.mode().map(u64::from))? & 0o7777,
            uid: field("uid", &raw.uid, pax.uid.map_or_else(|| header.uid(), Ok))?,
            gid: field("gid", &raw.gid, pax.gid.map_or_else(|| header.gid(), Ok))?,
            // Base-256 holds times before 1970 in two's complement, which the tar crate hands over as they are.
            mtime: pax.mtime.unwrap_or(Timestamp { seconds: seconds as i64, nanoseconds: 0 }),
            xattrs: pax.xattrs,
        };
        Ok(Some(Change::Node(Node { path, metadata, kind })))
    }

    /// A file whose map is in its header and the blocks behind it.
    fn old_sparse(&mut self, header: &tar::Header, stored: u64, path: &LayerPath) -> Result<Kind, Error> {
        let corrupt = |reason: String| Error::corrupt(format!("layer entry {path}"), reason);
        let Some(gnu) = header.as_gnu() else {
            return Err(corrupt("a sparse file in an archive that is not GNU tar's".to_owned()));
        };
        let size = gnu.real_size().map_err(|error| corrupt(format!("real size: {error}")))?;
        let limit = MAX_ENTRIES - self.entries;
        let next = || {
            let mut block = [0; BLOCK as usize];
            let filled = read_block(&mut self.inner, &mut block)
                .map_err(|error| Error::reading(&format!("layer entry {path}"), error))?;
            self.position += filled as u64;
            match filled {
                512 => Ok(block),
                _ => Err(corrupt("the stream ends inside its map".to_owned())),
            }
        };
        let map = sparse::read_old_map(gnu, limit, next, corrupt)?;
        self.begin_data(stored)?;
        self.with_map(&map, size, stored, path)
    }

    /// A file that PAX records say is sparse.
    fn sparse(&mut self, records: SparseRecords, stored: u64, path: &LayerPath) -> Result<Kind, Error> {
        let corrupt = |reason: String| Error::corrupt(format!("layer entry {path}"), reason);
        if let Some((major, minor)) = records.unknown_version() {
            return Err(Error::unsupported(
                format!("layer entry {path}"),
                format!("it is a sparse file of version {major}.{minor}, known are 0.0, 0.1 and 1.0"),
            ));
        }
        let Some(size) = records.size else {
            return Err(corrupt("a sparse file without its size".to_owned()));
        };
        self.begin_data(stored)?;
        if !records.has_map_in_data() {
            let map = records.map.ok_or_else(|| corrupt("a sparse file without its map".to_owned()))?;
            return self.with_map(&map, size, stored, path);
        }
        let limit = MAX_ENTRIES - self.entries;
        let map = sparse::read_map(self, limit)
            .map_err(|error| Error::reading(&format!("layer entry {path}"), error))?;
        self.with_map(&map, size, self.data_left, path)
    }

    fn with_map(&mut self, map: &[u64], size: u64, stored: u64, path: &LayerPath) -> Result<Kind, Error> {
        let runs = sparse::runs(map, size, stored, self.position)
            .map_err(|reason| Error::corrupt(format!("layer entry {path}"), reason))?;
        self.count(runs.len() as u64)?;
        Ok(match &runs[..] {
            [DataRun { start: 0, length, offset }] if *length == size => Kind::File { size, offset: *offset },
            [] if size == 0 => Kind::File { size, offset: self.position },
            _ => Kind::Sparse { size, runs },
        })
    }

    fn extension(
        &mut self,
        slot: &mut Option<Vec<u8>>,
        what: &str,
        size: u64,
        limit: u64,
        finish: fn(Vec<u8>) -> Vec<u8>,
    ) -> Result<(), Error> {
        if size > limit {
            return Err(self.corrupt(format!("a {what} of {size} bytes, at most {limit} expected")));
        }
        if slot.is_some() {
            return Err(self.corrupt(format!("two {what} entries for one entry")));
        }
        self.begin_data(size)?;
        let mut raw = vec![0; size as usize];
        self.read_exact(&mut raw).map_err(|error| self.reading(error))?;
        *slot = Some(finish(raw));
        Ok(())
    }

    fn begin_data(&mut self, size: u64) -> Result<(), Error> {
        let padding = size.checked_next_multiple_of(BLOCK).map(|padded| padded - size);
        let end = padding.and_then(|padding| self.position.checked_add(size)?.checked_add(padding));
        let (Some(padding), Some(_)) = (padding, end) else {
            return Err(self.corrupt(format!("an entry of {size} bytes")));
        };
        (self.data_left, self.padding) = (size, padding);
        Ok(())
    }

    fn next_header(&mut self) -> Result<Option<tar::Header>, Error> {
        if self.ended {
            return Ok(None);
        }
        let skip = self.data_left + self.padding;
        (self.data_left, self.padding) = (0, 0);
        let skipped = (self.skip)(&mut self.inner, skip);
        let skipped = skipped.map_err(|error| self.reading(error))?;
        self.position += skipped;
        if skipped != skip {
            return Err(self.corrupt("the stream ends inside an entry's data"));
        }
        let mut header = tar::Header::new_old();
        let filled =
            read_block(&mut self.inner, header.as_mut_bytes()).map_err(|error| self.reading(error))?;
        self.position += filled as u64;
        let zeros = header.as_bytes().iter().all(|byte| *byte == 0);
        match filled {
            // Some writers leave the end marker out.
            0 => {
                self.ended = true;
                return Ok(None);
            }
            512 if zeros => {
                self.ended = true;
                io::copy(&mut self.inner, &mut io::sink()).map_err(|error| self.reading(error))?;
                return Ok(None);
            }
            512 => {}
            _ => return Err(self.corrupt("the stream ends inside a header")),
        }
        // The checksum's own field counts as blanks.
        let total = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let all = &header.as_bytes()[..];
        let sum = total(&all[..148]) + 8 * u32::from(b' ') + total(&all[156..]);
        match header.cksum() {
            Ok(stored) if stored == sum => Ok(Some(header)),
            Ok(stored) => Err(self.corrupt(format!("a header's checksum is {stored}, expected {sum}"))),
            Err(error) => Err(self.corrupt(format!("a header's checksum: {error}"))),
        }
    }

    fn corrupt(&self, reason: impl Into<String>) -> Error {
        Error::corrupt(format!("layer at byte {} of its tar stream", self.position), reason)
    }

    fn reading(&self, error: io::Error) -> Error {
        Error::reading(&format!("layer at byte {} of its tar stream", self.position), error)
    }
}

/// The data of the last file.
impl<R: Read> Read for LayerReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.data_left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let count = self.inner.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the tar stream ends inside a file's data",
            ));
        }
        self.data_left -= count as u64;
        self.position += count as u64;
        Ok(count)
    }
}

fn trim_nul(mut raw: Vec<u8>) -> Vec<u8> {
    if let Some(end) = raw.iter().position(|byte| *byte == 0) {
        raw.truncate(end);
    }
    raw
}

/// Fills the block as far as the stream goes.
fn read_block(reader: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match reader.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(path: &[u8], kind: u8, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o100644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn entry(header: tar::Header, data: &[u8]) -> Vec<u8> {
        let mut out = header.as_bytes().to_vec();
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }

    fn changes(stream: &[u8]) -> Result<Vec<Change>, Error> {
        let mut reader = LayerReader::new(stream);
        let mut changes = Vec::new();
        while let Some(change) = reader.next_change()? {
            changes.push(change);
        }
        Ok(changes)
    }

    fn path(text: &str) -> LayerPath {
        LayerPath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn files_come_with_data_and_offset() {
        let mut stream = entry(header(b"./d/", b'5', 0), b"");
        stream.extend(entry(header(b"d/f", b'0', 600), &[7; 600]));
        stream.extend(entry(header(b"d/g", b'0', 3), b"abc"));
        stream.extend([0; 1024]);
        let mut reader = LayerReader::new(&stream[..]);
        let Some(Change::Node(directory)) = reader.next_change().unwrap() else { panic!("no directory") };
        assert_eq!((directory.path, directory.kind), (path("d"), Kind::Directory));
        let Some(Change::Node(first)) = reader.next_change().unwrap() else { panic!("no file") };
        assert_eq!(first.kind, Kind::File { size: 600, offset: 1024 });
        assert_eq!(first.metadata.mode, 0o644);
        let Some(Change::Node(second)) = reader.next_change().unwrap() else { panic!("no file") };
        let Kind::File { size: 3, offset } = second.kind else { panic!("{second:?}") };
        assert_eq!(&stream[offset as usize..offset as usize + 3], b"abc");
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        assert_eq!(data, b"abc");
        assert_eq!(reader.next_change().unwrap(), None);
    }

    #[test]
    fn whiteouts_are_typed() {
        let mut stream = entry(header(b"a/.wh.b", b'0', 0), b"");
        stream.extend(entry(header(b"a/.wh..wh..opq", b'0', 0), b""));
        stream.extend(entry(header(b".wh..wh.plnk", b'0', 0), b""));
        assert_eq!(changes(&stream).unwrap(), [Change::Whiteout(path("a/b")), Change::Opaque(path("a"))]);
        for name in [&b".wh."[..], b".wh...", b".wh.."] {
            assert!(
                matches!(changes(&entry(header(name, b'0', 0), b"")), Err(Error::Corrupt { .. })),
                "{name:?}"
            );
        }
    }

    #[test]
    fn long_names_come_from_gnu_and_pax() {
        let long = "n/".repeat(100) + "end";
        let mut stream =
            entry(header(b"././@LongLink", b'L', long.len() as u64 + 1), &[long.as_bytes(), b"\0"].concat());
        stream.extend(entry(header(b"short", b'0', 0), b""));
        let [Change::Node(node)] = &changes(&stream).unwrap()[..] else { panic!("one entry expected") };
        assert_eq!(node.path, path(&long));

        let records = Records {
            path: Some(long.clone().into_bytes()),
            uid: Some(100_000),
            size: Some(3),
            mtime: Some(Timestamp { seconds: 5, nanoseconds: 6 }),
            xattrs: [(b"user.a".to_vec(), b"1".to_vec())].into(),
            ..Records::default()
        };
        let raw = records.encode();
        let mut stream = entry(header(b"pax", b'x', raw.len() as u64), &raw);
        stream.extend(entry(header(b"short", b'0', 0), b"abc"));
        stream.extend(entry(header(b"next", b'0', 0), b""));
        let changes = changes(&stream).unwrap();
        let [Change::Node(node), Change::Node(next)] = &changes[..] else { panic!("two entries expected") };
        assert_eq!(
            (node.path.clone(), node.metadata.uid, node.metadata.mtime.nanoseconds),
            (path(&long), 100_000, 6)
        );
        assert_eq!(node.metadata.xattrs[&b"user.a"[..]], b"1");
        assert_eq!(next.path, path("next"), "the size of the PAX header counts");
    }

    #[test]
    fn global_headers_are_for_what_follows() {
        let pax = |kind, records: &[u8]| entry(header(b"pax", kind, records.len() as u64), records);
        let mut stream = entry(header(b"before", b'0', 0), b"");
        stream.extend(pax(b'g', b"9 uid=70\n25 SCHILY.xattr.user.a=1\n32 comment=what git archive has\n"));
        stream.extend(entry(header(b"first", b'0', 0), b""));
        stream.extend(pax(b'x', b"8 uid=7\n"));
        stream.extend(entry(header(b"second", b'0', 0), b""));
        stream.extend(pax(b'g', b"7 uid=\n9 gid=71\n"));
        stream.extend(entry(header(b"third", b'0', 0), b""));
        let seen: Vec<_> = changes(&stream)
            .unwrap()
            .into_iter()
            .map(|change| match change {
                Change::Node(Node { metadata, .. }) => (metadata.uid, metadata.gid, metadata.xattrs.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(seen, [(0, 0, 0), (70, 0, 1), (7, 0, 1), (0, 71, 1)]);
        assert!(changes(&pax(b'g', b"22 GNU.sparse.major=1\n")).is_err());

        // Every entry has a copy of what it inherits, so there may be fewer of them.
        let value = vec![b'v'; 60_000];
        let records =
            Records { xattrs: [(b"user.large".to_vec(), value)].into(), ..Records::default() }.encode();
        let mut reader = LayerReader::new(
            std::io::Cursor::new(pax(b'g', &records)).chain(Endless(entry(header(b"f", b'0', 0), b""), 0)),
        );
        let error = loop {
            match reader.next_change() {
                Ok(change) => assert!(change.is_some()),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("entries"), "{error}");
    }

    /// The same bytes again and again.
    struct Endless(Vec<u8>, usize);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(self.0.len() - self.1);
            buffer[..count].copy_from_slice(&self.0[self.1..self.1 + count]);
            self.1 = (self.1 + count) % self.0.len();
            Ok(count)
        }
    }

    #[test]
    fn hostile_entries_are_refused() {
        let mut link = header(b"l", b'1', 0);
        link.as_old_mut().linkname[..9].copy_from_slice(b"../secret");
        link.set_cksum();
        let mut damaged = header(b"f", b'0', 0);
        damaged.as_mut_bytes()[0] = b'g';
        let cases: [(&str, Vec<u8>); 10] = [
            ("..", entry(header(b"a/../../b", b'0', 0), b"")),
            ("hard link to ..", entry(link, b"")),
            ("hard link without target", entry(header(b"l", b'1', 0), b"")),
            ("directory with data", entry(header(b"d", b'5', 512), &[0; 512])),
            ("file as root", entry(header(b"./", b'2', 0), b"")),
            ("checksum", entry(damaged, b"")),
            ("truncated data", entry(header(b"f", b'0', 2000), &[1; 512])),
            ("truncated header", vec![1; 100]),
            ("huge PAX header", entry(header(b"p", b'x', MAX_PAX_HEADER + 1), b"")),
            ("dangling extension", entry(header(b"p", b'L', 3), b"abc")),
        ];
        for (name, stream) in cases {
            let result = changes(&stream);
            assert!(matches!(result, Err(Error::Corrupt { .. })), "{name}: {result:?}");
        }
        let sparse = changes(&entry(header(b"s", b'S', 0), b""));
        assert!(matches!(sparse, Err(Error::Corrupt { .. })), "{sparse:?}");
        let mut endless = header(b"f", b'0', 0);
        // Base-256, all ones.
        endless.as_old_mut().size = [0xff; 12];
        endless.set_cksum();
        assert!(changes(&entry(endless, b"")).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(mut stream in proptest::collection::vec(proptest::num::u8::ANY, 0..4096)) {
            let _ = changes(&stream);
            // The same with a checksum that fits, so that the fields behind it are reached.
            if stream.len() >= 512 {
                let mut header = tar::Header::new_old();
                header.as_mut_bytes().copy_from_slice(&stream[..512]);
                header.set_cksum();
                stream[..512].copy_from_slice(header.as_bytes());
                let _ = changes(&stream);
            }
        }
    }
}
