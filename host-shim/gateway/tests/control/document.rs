//! The OpenAPI document is true: it lists what the router has, and answers are what it says.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use boon::{Compiler, Draft, Schemas};
use http::Method;
use serde_json::Value;
use tiffin_gateway::control::{NOT_SERVED, SERVED, openapi};

use crate::gateway::{Answer, TestGateway};

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| serde_json::to_value(openapi()).unwrap());

/// Every operation: method, path, and whether it needs a key.
pub(crate) fn operations() -> Vec<(Method, String, bool)> {
    let mut found = Vec::new();
    for (path, item) in DOCUMENT["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let keyed = operation.get("security").is_none_or(|security| security != &serde_json::json!([{}]));
            found.push((method.to_uppercase().parse().unwrap(), path.clone(), keyed));
        }
    }
    found
}

/// The path of the document that a request's path is an instance of; the one with fewer names where there are two.
fn pattern(path: &str) -> Option<&'static str> {
    let parts: Vec<&str> = path.split('/').collect();
    let fits = |pattern: &&String| {
        let names: Vec<&str> = pattern.split('/').collect();
        names.len() == parts.len()
            && names.iter().zip(&parts).all(|(name, part)| name.starts_with('{') || name == part)
    };
    let candidates = DOCUMENT["paths"].as_object().unwrap().keys().filter(fits);
    candidates.min_by_key(|pattern| pattern.matches('{').count()).map(String::as_str)
}

/// Asserts that an answer is one that the document has for the request.
#[track_caller]
pub(crate) fn check(method: &Method, path: &str, answer: &Answer) {
    let escape =
        |text: &str| text.replace('~', "~0").replace('/', "~1").replace('{', "%7B").replace('}', "%7D");
    let operation = pattern(path).map(|pattern| (pattern, method.as_str().to_lowercase()));
    let known = operation.as_ref().and_then(|(pattern, method)| DOCUMENT["paths"][pattern].get(method));
    let error = "/components/schemas/Error".to_owned();
    let pointer = match (known, operation) {
        // Of requests that no operation takes, the document says only how they are refused.
        (None, _) | (_, None) => error,
        (Some(known), Some((pattern, method))) => {
            let status = answer.status.as_str();
            let range = format!("{}XX", &status[..1]);
            let responses = known["responses"].as_object().unwrap();
            // What is left is a refusal: a success that is not listed is a mistake.
            let rest = if answer.status.is_success() { status } else { "default" };
            let named = [status, range.as_str(), rest].into_iter().find(|name| responses.contains_key(*name));
            match named {
                Some(name) if responses[name].get("content").is_none() => {
                    assert_eq!(answer.text, "", "{method} {path} {name} has no body");
                    return;
                }
                Some(name) => match responses[name]["content"].get("application/json") {
                    Some(_) => format!(
                        "/paths/{}/{method}/responses/{name}/content/application~1json/schema",
                        escape(pattern)
                    ),
                    None => return,
                },
                None => panic!("the document has no {status} for {method} {pattern}: {answer:?}"),
            }
        }
    };
    assert_eq!(answer.header("content-type"), Some("application/json"), "{answer:?}");
    let mut compiler = Compiler::new();
    compiler.set_default_draft(Draft::V2020_12);
    compiler.enable_format_assertions();
    compiler.add_resource("http://gateway/openapi.json", DOCUMENT.clone()).unwrap();
    let mut schemas = Schemas::new();
    let schema = compiler.compile(&format!("http://gateway/openapi.json#{pointer}"), &mut schemas);
    let schema = schema.unwrap_or_else(|error| panic!("{pointer}: {error:#}"));
    if let Err(error) = schemas.validate(&answer.json(), schema) {
        panic!("{method} {path}: the answer is not what the document says: {error:#}\n{}", answer.text);
    }
}

#[test]
fn the_document_lists_every_route_and_no_other() {
    let served = SERVED.iter().map(|route| (route.method, route.path, route.keyed));
    let not_served = NOT_SERVED.iter().map(|route| (route.method, route.path, true));
    let routes: BTreeSet<_> = served.chain(not_served).collect();
    assert_eq!(routes.len(), SERVED.len() + NOT_SERVED.len(), "a route is there twice");
    let operations = operations();
    let listed: BTreeSet<_> =
        operations.iter().map(|(method, path, keyed)| (method.as_str(), path.as_str(), *keyed)).collect();
    assert_eq!(listed, routes);
    let open: Vec<_> = SERVED.iter().filter(|route| !route.keyed).map(|route| route.path).collect();
    assert_eq!(open, ["/uploads/{teamID}/{hash}", "/health", "/metrics", "/openapi.json"]);
}

#[test]
fn the_document_is_openapi_3_1_and_its_schemas_compile() {
    assert_eq!(DOCUMENT["openapi"], "3.1.0");
    for name in DOCUMENT["components"]["schemas"].as_object().unwrap().keys() {
        let mut compiler = Compiler::new();
        compiler.set_default_draft(Draft::V2020_12);
        compiler.add_resource("http://gateway/openapi.json", DOCUMENT.clone()).unwrap();
        let pointer = format!("http://gateway/openapi.json#/components/schemas/{name}");
        compiler.compile(&pointer, &mut Schemas::new()).unwrap();
    }
}

#[test]
fn a_wrong_answer_would_be_noticed() {
    let answer = |text: &str| Answer {
        status: http::StatusCode::OK,
        headers: [(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"))]
            .into_iter()
            .collect(),
        text: text.to_owned(),
    };
    let refused = |path: &'static str, text: &str| {
        let answer = answer(text);
        std::panic::catch_unwind(|| check(&Method::GET, path, &answer)).is_err()
    };
    assert!(!refused("/sandboxes", "[]"));
    assert!(refused("/sandboxes", "{}"));
    assert!(refused("/sandboxes", r#"[{"sandboxID":"x"}]"#));
    assert!(refused("/sandboxes/x", "{}"));
    assert!(refused("/no/such", "[]"));
}

#[tokio::test]
async fn the_document_is_served() {
    let gateway = TestGateway::start().await;
    let served = gateway.get("/openapi.json").await.is(200).json();
    assert_eq!(served, *DOCUMENT);
}

#[test]
fn the_document_changes_only_on_purpose() {
    let lines = operations().into_iter().map(|(method, path, keyed)| {
        let open = if keyed { "" } else { " (no key)" };
        let not = NOT_SERVED.iter().any(|route| route.method == method.as_str() && route.path == path);
        format!("{method} {path}{open}{}\n", if not { " 501" } else { "" })
    });
    insta::assert_snapshot!(lines.collect::<String>());
}
