//! Files that steps copy: where they are to be sent, and their arrival.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::access::Caller;
use super::body::Params;
use super::template_builds::no_template;
use super::types::ErrorBody;
use super::{Control, OverTls};
use crate::ApiError;
use crate::builds::{Address, Expected, request::is_hash};

/// Whether files are there, and where to send them.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FileUpload {
    present: bool,
    /// Takes one PUT of the archive, without a key, for two hours.
    url: String,
}

/// That an address was given by this gateway.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UploadQuery {
    /// Seconds since 1970 until which it is good.
    expires: i64,
    signature: String,
}

/// Whether the team's files of that hash are there, and where to send them.
#[utoipa::path(get, path = "/templates/{templateID}/files/{hash}", tag = "templates",
    params(("templateID" = String, Path), ("hash" = String, Path, description = "64 hexadecimal digits, the client's own")),
    responses((status = 201, body = FileUpload), (status = "4XX", body = ErrorBody)))]
pub(super) async fn link(
    State(control): State<Arc<Control>>,
    caller: Caller,
    names: Result<Path<(String, String)>, PathRejection>,
    request: Request,
) -> Result<(StatusCode, Json<FileUpload>), ApiError> {
    let Path((template, hash)) = names.map_err(|rejection| ApiError::not_found(rejection.body_text()))?;
    let team = &caller.team.id;
    if control.gateway.store.template(team, &template).await?.is_none() {
        return Err(no_template(&template));
    }
    if !is_hash(&hash) {
        return Err(ApiError::bad_request("expected a hash of 64 hexadecimal digits (0-9, a-f)"));
    }
    let uploads = &control.gateway.builds.uploads;
    let present = uploads.has(team, &hash).await.map_err(ApiError::internal)?;
    let Address { expires, signature } = uploads.address(team, &hash);
    let team = utf8_percent_encode(&team.0, NON_ALPHANUMERIC);
    let origin = origin(&request.into_parts().0)?;
    let url = format!("{origin}/uploads/{team}/{hash}?expires={expires}&signature={signature}");
    Ok((StatusCode::CREATED, Json(FileUpload { present, url })))
}

/// Takes files in. They are there when this is answered, and on the disk.
#[utoipa::path(put, path = "/uploads/{teamID}/{hash}", tag = "templates", security(()),
    params(("teamID" = String, Path), ("hash" = String, Path), UploadQuery,
        ("Content-Digest" = Option<String>, Header, description = "`sha-256=:BASE64:` (RFC 9530): other bytes are refused")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204), (status = "4XX", body = ErrorBody), (status = 507, body = ErrorBody)))]
pub(super) async fn receive(
    State(control): State<Arc<Control>>,
    names: Result<Path<(String, String)>, PathRejection>,
    Params(query): Params<UploadQuery>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let Path((team, hash)) = names.map_err(|rejection| ApiError::not_found(rejection.body_text()))?;
    let uploads = &control.gateway.builds.uploads;
    let address = Address { expires: query.expires, signature: query.signature };
    let team = uploads.check(&team, &hash, &address)?;
    let expected = Expected::read(request.headers())?;
    let limit = control.gateway.store.build_limits(&team).await?.uploads();
    uploads.receive(&team, &hash, request.into_body(), expected, limit).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Where the client reaches the gateway: it has just done so.
fn origin(parts: &Parts) -> Result<String, ApiError> {
    let authority = parts.uri.authority().map(|authority| authority.as_str().to_owned());
    let host = || Some(parts.headers.get(header::HOST)?.to_str().ok()?.to_owned());
    let host = authority.or_else(host).filter(|host| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".:-_[]".contains(&byte);
        !host.is_empty() && host.bytes().all(plain)
    });
    let host = host.ok_or_else(|| ApiError::bad_request("expected a Host header with the gateway's name"))?;
    let forwarded = parts.headers.get("x-forwarded-proto").and_then(|value| value.to_str().ok());
    let https = parts.extensions.get::<OverTls>().is_some()
        || parts.uri.scheme_str() == Some("https")
        || forwarded.is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
    Ok(format!("http{}://{host}", if https { "s" } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_sent_where_the_client_is() {
        let of = |uri: &str, headers: &[(&str, &str)]| {
            let mut request = Request::builder().uri(uri);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            origin(&request.body(()).unwrap().into_parts().0).map_err(|error| error.status.as_u16())
        };
        assert_eq!(of("/x", &[("host", "127.0.0.1:3000")]), Ok("http://127.0.0.1:3000".into()));
        assert_eq!(of("/x", &[("host", "a"), ("x-forwarded-proto", "https")]), Ok("https://a".into()));
        assert_eq!(of("https://api.example/x", &[]), Ok("https://api.example".into()));
        assert_eq!(of("/x", &[("host", "a/b")]), Err(400));
        assert_eq!(of("/x", &[]), Err(400));
        let mut parts = Request::builder().uri("/x").header("host", "a").body(()).unwrap().into_parts().0;
        parts.extensions.insert(OverTls);
        assert_eq!(origin(&parts).unwrap(), "https://a");
    }
}
