//! Any text frame of a JSON-RPC client: it is read as what its JSON says, written anew it is read as the same, and its
//! answer is JSON under the id that came.
//!
//! Input: the frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tiffin_gateway::legacy::rpc::{self, Arguments, Frame, MAX_BATCH, Message, RpcError};

/// One less than the call among the seeds has: both sides of the bound are near.
const MAX_ARGUMENTS: usize = 3;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // serde_json keeps numbers beyond f64 and text that is no Unicode as they came, but has no `Value` for them; an object
    // with its own name for a raw value as a key would be read as that value.
    let value = serde_json::from_str::<Value>(text).ok().filter(|_| !text.contains("serde_json"));
    match rpc::parse(text) {
        Ok(Frame::Single(message)) => {
            if let Some(value) = &value {
                assert!(!value.is_array());
                means(&message, value);
            }
            survives(&message);
            let answer = answer(&message);
            let alone = format!("[{text}]");
            let Ok(Frame::Batch(batch)) = rpc::parse(&alone) else { panic!("{alone:?}") };
            assert_eq!(batch.iter().map(self::answer).collect::<Vec<_>>(), [answer]);
        }
        Ok(Frame::Batch(messages)) => {
            assert!((1..=MAX_BATCH).contains(&messages.len()));
            if let Some(value) = &value {
                let values = value.as_array().unwrap();
                assert_eq!(values.len(), messages.len());
                messages.iter().zip(values).for_each(|(message, value)| means(message, value));
            }
            messages.iter().for_each(survives);
            let answers: Vec<String> = messages.iter().filter_map(answer).collect();
            let batch = rpc::batch(&answers);
            let elements: Vec<&RawValue> = serde_json::from_str(&batch).unwrap();
            // Each is one element of the whole: none of them closes it.
            assert!(elements.iter().map(|raw| raw.get()).eq(answers.iter().map(String::as_str)));
        }
        Err(error) => {
            let size = value.as_ref().and_then(Value::as_array).map(Vec::len);
            match error.code {
                -32700 => assert!(value.is_none(), "{error}: {value:?}"),
                -32600 => assert!(value.is_none() || size == Some(0) || size > Some(MAX_BATCH), "{error}"),
                code => panic!("{code}: {error}"),
            }
            check_answer(None, &rpc::answer(None, &Err(error)));
        }
    }
});

/// The message is what the specification says about that JSON.
fn means(message: &Message<'_>, value: &Value) {
    let method_of =
        |value: &Value| value["method"].as_str().filter(|name| !name.is_empty()).map(str::to_owned);
    let is_id = |id: &Value| !id.is_object() && !id.is_array();
    let same = |raw: Option<&RawValue>, value: Option<&Value>| {
        assert_eq!(raw.map(|raw| serde_json::from_str(raw.get()).unwrap()).as_ref(), value);
    };
    let is_ours = value["jsonrpc"] == "2.0";
    match message {
        Message::Call { id, method, params } => {
            assert!(is_ours && is_id(&value["id"]), "{value}");
            assert_eq!(method_of(value).as_ref(), Some(method));
            same(Some(id), value.get("id"));
            same(*params, value.get("params"));
        }
        Message::Notification { method, params } => {
            assert!(is_ours && value.get("id").is_none(), "{value}");
            assert_eq!(method_of(value).as_ref(), Some(method));
            same(*params, value.get("params"));
        }
        Message::Response => {
            assert!(is_ours && is_id(&value["id"]) && method_of(value).is_none(), "{value}");
            assert!(value.get("result").is_some() || value.get("error").is_some(), "{value}");
        }
        Message::Invalid { id } => {
            same(*id, value.get("id").filter(|id| is_id(id)));
            let is_request = is_ours && method_of(value).is_some() && value.get("id").is_none_or(is_id);
            assert!(!is_request, "{value}");
        }
    }
}

/// A request that is written anew is the same request.
fn survives(message: &Message<'_>) {
    let (id, method, params) = match message {
        Message::Call { id, method, params } => (Some(*id), method, *params),
        Message::Notification { method, params } => (None, method, *params),
        Message::Response | Message::Invalid { .. } => return,
    };
    arguments(params);
    let field = |name: &str, raw: Option<&RawValue>| {
        raw.map(|raw| format!(r#","{name}":{}"#, raw.get())).unwrap_or_default()
    };
    let again = format!(
        r#"{{"jsonrpc":"2.0","method":{}{}{}}}"#,
        json!(method),
        field("id", id),
        field("params", params)
    );
    let (read_id, read_method, read_params) = match rpc::parse(&again) {
        Ok(Frame::Single(Message::Call { id, method, params })) => (Some(id), method, params),
        Ok(Frame::Single(Message::Notification { method, params })) => (None, method, params),
        other => panic!("{again:?}: {other:?}"),
    };
    let text = |raw: Option<&RawValue>| raw.map(|raw| raw.get().to_owned());
    assert_eq!(
        (text(read_id), &read_method, text(read_params)),
        (text(id), method, text(params)),
        "{again:?}"
    );
}

/// Arguments are the elements of the array, or none.
fn arguments(params: Option<&RawValue>) {
    let elements: Option<Vec<&RawValue>> = params.map_or(Some(vec![]), |raw| {
        serde_json::from_str::<Option<_>>(raw.get()).ok().map(Option::unwrap_or_default)
    });
    match (Arguments::parse(params, MAX_ARGUMENTS), elements) {
        (Ok(arguments), Some(elements)) => {
            assert!(elements.len() <= MAX_ARGUMENTS);
            for index in 0..=MAX_ARGUMENTS {
                let wanted = elements.get(index).map(|raw| raw.get()).filter(|text| *text != "null");
                let found = arguments.optional::<Box<RawValue>>(index);
                // `null` is a raw value too.
                let found = found.unwrap().filter(|raw| raw.get() != "null");
                assert_eq!(found.as_ref().map(|raw| raw.get()), wanted);
                let text: Result<String, RpcError> = arguments.required(index);
                match (text, wanted) {
                    (Ok(text), Some(wanted)) => {
                        assert_eq!(serde_json::from_str::<String>(wanted).unwrap(), text)
                    }
                    (Ok(text), None) => panic!("{text:?} of nothing"),
                    (Err(error), _) => assert_eq!(error.code, -32602, "{error}"),
                }
            }
        }
        (Err(error), elements) => {
            assert_eq!(error.code, -32602, "{error}");
            assert!(elements.is_none_or(|elements| elements.len() > MAX_ARGUMENTS), "{error}");
        }
        (Ok(_), None) => panic!("arguments of {params:?}"),
    }
}

/// The answer that a gateway would give which has no method at all.
fn answer(message: &Message<'_>) -> Option<String> {
    let (id, error) = match message {
        Message::Call { id, method, .. } => (Some(*id), RpcError::no_method(method)),
        Message::Invalid { id } => (*id, RpcError::invalid_request("invalid request")),
        Message::Notification { .. } | Message::Response => return None,
    };
    let answer = rpc::answer(id, &Err(error));
    check_answer(id, &answer);
    Some(answer)
}

/// It is one object under that id, to the letter, with an error and no result.
fn check_answer(id: Option<&RawValue>, answer: &str) {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Answer<'a> {
        jsonrpc: &'a str,
        #[serde(borrow)]
        id: &'a RawValue,
        error: Value,
    }
    let read: Answer<'_> = serde_json::from_str(answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
    assert_eq!((read.jsonrpc, read.id.get()), ("2.0", id.map_or("null", RawValue::get)));
    assert!(read.error["code"].is_i64() && read.error["message"].is_string(), "{answer}");
}
