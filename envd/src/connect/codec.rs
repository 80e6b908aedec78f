//! The two encodings of a message.

use bytes::Bytes;
use envd_channel::envelope;
use http::{HeaderMap, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Code, Error};

/// A message that has both encodings.
pub trait Message: prost::Message + Default + Serialize + DeserializeOwned {}

impl<T: prost::Message + Default + Serialize + DeserializeOwned> Message for T {}

/// How a call's messages are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// protobuf's canonical JSON mapping.
    Json,
    /// protobuf's binary encoding.
    Proto,
}

impl Codec {
    /// The codec of a unary call, if the content type names one.
    pub fn of_unary(headers: &HeaderMap) -> Option<Self> {
        match content_type(headers)? {
            "application/json" => Some(Self::Json),
            "application/proto" => Some(Self::Proto),
            _ => None,
        }
    }

    /// The codec of a stream, if the content type names one.
    pub fn of_stream(headers: &HeaderMap) -> Option<Self> {
        match content_type(headers)? {
            "application/connect+json" => Some(Self::Json),
            "application/connect+proto" => Some(Self::Proto),
            _ => None,
        }
    }

    pub(super) fn unary_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Proto => "application/proto",
        }
    }

    pub(crate) fn stream_type(self) -> &'static str {
        match self {
            Self::Json => "application/connect+json",
            Self::Proto => "application/connect+proto",
        }
    }

    /// Reads a message.
    pub fn decode<M: Message>(self, bytes: &[u8]) -> Result<M, Error> {
        match self {
            Self::Json => serde_json::from_slice(bytes).map_err(|error| malformed(&error)),
            Self::Proto => M::decode(bytes).map_err(|error| malformed(&error)),
        }
    }

    /// Writes a message.
    pub fn encode<M: Message>(self, message: &M) -> Result<Bytes, Error> {
        match self {
            Self::Json => serde_json::to_vec(message).map(Bytes::from).map_err(|error| unwritable(&error)),
            Self::Proto => Ok(message.encode_to_vec().into()),
        }
    }

    /// Writes a message of a stream, in its envelope: output goes through here, so it is copied once and not twice.
    pub(super) fn encode_enveloped<M: Message>(self, message: &M) -> Result<Bytes, Error> {
        let mut bytes = Vec::new();
        match self {
            Self::Json => {
                bytes.resize(envelope::HEADER_SIZE, 0);
                serde_json::to_writer(&mut bytes, message).map_err(|error| unwritable(&error))?;
            }
            Self::Proto => {
                bytes.reserve_exact(envelope::HEADER_SIZE + message.encoded_len());
                bytes.resize(envelope::HEADER_SIZE, 0);
                message.encode(&mut bytes).map_err(|error| unwritable(&error))?;
            }
        }
        Ok(envelope::seal(0, bytes))
    }
}

fn unwritable(error: &dyn std::error::Error) -> Error {
    Error::new(Code::Internal, format!("encoding the answer failed: {error}"))
}

fn malformed(error: &dyn std::error::Error) -> Error {
    Error::new(Code::InvalidArgument, format!("the message cannot be read: {error}"))
}

fn content_type(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    // Parameters such as "; charset=utf-8" do not choose another codec.
    Some(value.split(';').next().unwrap_or(value).trim())
}
