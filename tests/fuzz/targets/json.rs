//! The JSON mapping of every request message: what is read and printed is read as the same again, and the binary form of
//! a message says the same as its JSON.
//!
//! Input: one byte that chooses the message, one that chooses the form, then the message in it.
#![no_main]

use std::fmt::Debug;

use envd_proto::{filesystem as f, process as p};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|input: &[u8]| {
    let [which, form, message @ ..] = input else { return };
    let json = form & 1 == 0;
    match which % 16 {
        0 => check::<p::StartRequest>(json, message),
        1 => check::<p::ConnectRequest>(json, message),
        2 => check::<p::ListRequest>(json, message),
        3 => check::<p::UpdateRequest>(json, message),
        4 => check::<p::StreamInputRequest>(json, message),
        5 => check::<p::SendInputRequest>(json, message),
        6 => check::<p::SendSignalRequest>(json, message),
        7 => check::<p::CloseStdinRequest>(json, message),
        8 => check::<f::StatRequest>(json, message),
        9 => check::<f::MakeDirRequest>(json, message),
        10 => check::<f::MoveRequest>(json, message),
        11 => check::<f::ListDirRequest>(json, message),
        12 => check::<f::RemoveRequest>(json, message),
        13 => check::<f::WatchDirRequest>(json, message),
        14 => check::<f::CreateWatcherRequest>(json, message),
        _ => check::<f::GetWatcherEventsRequest>(json, message),
    }
});

fn check<M>(json: bool, input: &[u8])
where
    M: Message + Default + PartialEq + Debug + Serialize + DeserializeOwned,
{
    let message = match json {
        true => serde_json::from_slice::<M>(input).ok(),
        false => M::decode(input).ok(),
    };
    let Some(message) = message else { return };
    let binary = message.encode_to_vec();
    assert_eq!(M::decode(&binary[..]).unwrap(), message);
    match serde_json::to_string(&message) {
        Ok(printed) => {
            let again: M =
                serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"));
            assert_eq!(again, message, "{printed}");
            // As values: a map has no order.
            let value: serde_json::Value = serde_json::from_str(&printed).unwrap();
            assert_eq!(serde_json::to_value(&again).unwrap(), value);
        }
        // A number that no name of an enum has can come in binary only.
        Err(error) => assert!(!json, "{error}: {message:?}"),
    }
}
