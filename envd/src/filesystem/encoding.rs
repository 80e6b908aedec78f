//! Content codings of /files: which one a client takes (RFC 9110, 12.5.3), and gzip in both directions, streamed.

use std::io::{self, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzEncoder, MultiGzDecoder};
use futures::{Stream, StreamExt};
use http::{HeaderMap, header};

use crate::root::{Held, Root};

/// What one step of decompression gives at the most, or little more: a few bytes of gzip can stand for a thousand times
/// as many.
const STEP: usize = 256 << 10;

/// A coding that the agent speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
}

/// The coding for a client; `None` when it takes neither.
pub(super) fn accepted(headers: &HeaderMap) -> Option<Coding> {
    let (mut gzip, mut identity, mut any) = (None, None, None);
    let values = headers.get_all(header::ACCEPT_ENCODING);
    for item in values.iter().filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(',')) {
        let mut parts = item.split(';').map(str::trim);
        let coding = parts.next().unwrap_or("").to_ascii_lowercase();
        let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        // What is no number says no.
        let weight: f32 = weight.map_or(1.0, |text| text.parse().unwrap_or(0.0));
        match coding.as_str() {
            "gzip" | "x-gzip" => gzip = Some(weight),
            "identity" => identity = Some(weight),
            "*" => any = Some(weight),
            _ => {}
        }
    }
    // Without a word about it a file may always come as it is.
    let plain = identity.or(any.filter(|weight| *weight == 0.0)).unwrap_or(1.0);
    match gzip {
        Some(weight) if weight > 0.0 && identity.is_none_or(|plain| weight >= plain) => Some(Coding::Gzip),
        _ if plain > 0.0 => Some(Coding::Identity),
        None if any.is_some_and(|weight| weight > 0.0) => Some(Coding::Gzip),
        _ => None,
    }
}

/// A stream in gzip, compressed on the root's threads at the level that costs least.
pub(super) fn compress(
    root: Root,
    plain: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let state = Some((Box::pin(plain), Held::new(&root, encoder)));
    let pieces = futures::stream::try_unfold(state, |state| async move {
        let Some((mut plain, encoder)) = state else { return Ok::<_, io::Error>(None) };
        match plain.next().await.transpose()? {
            Some(bytes) => {
                let step = encoder.with(move |encoder| {
                    encoder.write_all(&bytes)?;
                    Ok(std::mem::take(encoder.get_mut()))
                });
                let (encoder, compressed) = step.await?;
                Ok(Some((Bytes::from(compressed), Some((plain, encoder)))))
            }
            None => Ok(Some((encoder.finish(GzEncoder::finish).await?.into(), None))),
        }
    });
    // An empty piece would end a chunked body.
    pieces.filter(|piece| {
        let keep = piece.as_ref().map_or(true, |bytes| !bytes.is_empty());
        async move { keep }
    })
}

/// A gzip stream as what it holds. Ends with an error where the input is corrupt or cut short.
pub(super) fn decompress<E: std::fmt::Display + Send + 'static>(
    root: Root,
    compressed: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
) -> impl Stream<Item = Result<Bytes, String>> + Send + 'static {
    let decoder = Held::new(&root, MultiGzDecoder::new(Vec::new()));
    let state = Some((compressed, Bytes::new(), decoder));
    futures::stream::try_unfold(state, |state| async move {
        let Some((mut compressed, mut input, decoder)) = state else { return Ok::<_, String>(None) };
        if input.is_empty() {
            match compressed.next().await.transpose().map_err(|error| error.to_string())? {
                Some(bytes) => input = bytes,
                None => {
                    let rest = decoder.finish(MultiGzDecoder::finish).await.map_err(corrupt)?;
                    return Ok(Some((Bytes::from(rest), None)));
                }
            }
        }
        let step = decoder.with(move |decoder| {
            let mut taken = 0;
            while taken < input.len() && decoder.get_ref().len() < STEP {
                // Each write gives at most its own buffer of 32 KiB.
                taken += decoder.write(&input[taken..])?;
            }
            Ok((input.split_off(taken), std::mem::take(decoder.get_mut())))
        });
        let (decoder, (input, plain)) = step.await.map_err(corrupt)?;
        Ok(Some((Bytes::from(plain), Some((compressed, input, decoder)))))
    })
}

fn corrupt(error: io::Error) -> String {
    format!("the gzip data is corrupt or cut short: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coding_is_what_the_client_prefers() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, text.parse().unwrap());
            accepted(&headers)
        };
        assert_eq!(accepted(&HeaderMap::new()), Some(Coding::Identity));
        for gzip in [
            "gzip",
            "gzip, deflate",
            "zstd, GZIP;q=0.5",
            "identity;q=0.5, gzip;q=1.0",
            "*, identity;q=0",
            "gzip;q=0.1, *;q=0",
        ] {
            assert_eq!(of(gzip), Some(Coding::Gzip), "{gzip}");
        }
        for plain in [
            "",
            "identity",
            "gzip;q=0",
            "gzip;q=0.5, identity",
            "br",
            "*",
            "gzip;q=x",
            "*;q=0, identity;q=0.1",
        ] {
            assert_eq!(of(plain), Some(Coding::Identity), "{plain}");
        }
        for neither in
            ["identity;q=0", "*;q=0", "br, identity;q=0", "gzip;q=0, *;q=0", "gzip;q=0, identity;q=0, *"]
        {
            assert_eq!(of(neither), None, "{neither}");
        }
    }

    async fn decompressed(pieces: Vec<Vec<u8>>) -> Result<Vec<u8>, String> {
        let pieces = pieces.into_iter().map(|piece| Ok::<_, String>(Bytes::from(piece)));
        let mut steps = std::pin::pin!(decompress(Root::own(), futures::stream::iter(pieces)));
        let mut all = Vec::new();
        while let Some(step) = steps.next().await.transpose()? {
            assert!(step.len() <= STEP + (64 << 10), "a step of {} bytes", step.len());
            all.extend_from_slice(&step);
        }
        Ok(all)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[tokio::test]
    async fn gzip_goes_both_ways_in_bounded_steps() {
        let plain: Vec<u8> =
            (0..8 << 20).map(|n: u32| if n < 4 << 20 { 0 } else { (n.wrapping_mul(n) >> 7) as u8 }).collect();
        let pieces: Vec<_> = plain.chunks(100_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let compressed: Vec<_> = compress(Root::own(), futures::stream::iter(pieces)).collect().await;
        let compressed = compressed.into_iter().map(|piece| piece.unwrap().to_vec()).collect();
        assert_eq!(decompressed(compressed).await.unwrap(), plain);
        let bomb = gzip(&vec![0; 64 << 20]);
        assert!(bomb.len() < 70 << 10);
        assert_eq!(decompressed(vec![bomb]).await.unwrap().len(), 64 << 20);
    }

    #[tokio::test]
    async fn what_is_cut_short_or_corrupt_is_an_error() {
        let whole = gzip(&(0..100_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
        for cut in [0, 1, 5, 10, 100, whole.len() / 2, whole.len() - 9, whole.len() - 8, whole.len() - 1] {
            assert!(decompressed(vec![whole[..cut].to_vec()]).await.is_err(), "cut at {cut}");
        }
        for changed in [0, 2, whole.len() / 2, whole.len() - 8, whole.len() - 4] {
            let mut corrupt = whole.clone();
            corrupt[changed] ^= 0xff;
            assert!(decompressed(vec![corrupt]).await.is_err(), "changed at {changed}");
        }
        let bytewise = whole.iter().map(|byte| vec![*byte]).collect();
        assert_eq!(decompressed(bytewise).await.unwrap().len(), 400_000);
        let twice = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(decompressed(vec![twice]).await.unwrap(), b"onetwo");
        let garbage = [gzip(b"one"), b"garbage".to_vec()].concat();
        assert!(decompressed(vec![garbage]).await.is_err());
    }
}
