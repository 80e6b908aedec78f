//! The OpenAPI 3.1 document: from the handlers and their types, and from the table of what is not served.

use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::schema::{Object, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Ref, Required, ResponseBuilder};
use utoipa::{Modify, OpenApi};

use super::types::ErrorBody;
use super::{
    NOT_SERVED, create, fork, list, logs, machine, metrics, sandbox, snapshots, template_builds,
    template_files, template_tags, templates, tunnel,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "tiffin-gateway",
        description = "The control API of sandboxes on one machine, as the published E2B SDKs speak it. Every refusal is a JSON \
            object with `code` and `message`.",
    ),
    paths(
        create::create_v2,
        create::create_v1,
        sandbox::connect_v2,
        sandbox::connect_v1,
        sandbox::pause,
        sandbox::resume,
        fork::fork,
        snapshots::create,
        snapshots::list,
        list::list_v2,
        list::list_v1,
        sandbox::info,
        sandbox::kill,
        sandbox::set_timeout,
        sandbox::refresh,
        metrics::of_sandbox,
        metrics::of_sandboxes,
        logs::logs_v1,
        logs::logs_v2,
        tunnel::open,
        machine::teams,
        templates::list,
        templates::alias,
        template_builds::request_v3,
        template_builds::request_v2,
        template_builds::start,
        template_builds::status,
        template_builds::cancel,
        template_files::link,
        template_files::receive,
        template_tags::assign,
        template_tags::remove,
        template_tags::list,
        template_tags::delete,
        machine::health,
        machine::metrics,
        machine::document,
    ),
    components(schemas(ErrorBody)),
    security(("ApiKeyAuth" = []), ("BearerAuth" = [])),
    modifiers(&Keys, &Missing),
)]
struct Document;

/// The document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// How a key is sent.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        let key = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-KEY")));
        components.add_security_scheme("ApiKeyAuth", key);
        let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        components.add_security_scheme("BearerAuth", bearer);
        let token = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-Access-Token")));
        components.add_security_scheme("AccessTokenAuth", token);
    }
}

/// Each route that needs a key may answer 401, and all refuse what makes no sense in the same shape.
fn refused(document: &mut utoipa::openapi::OpenApi) {
    for item in document.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            if operation.security.is_none() {
                responses.insert("401".into(), error("no key, or one that no team has").into());
            }
            responses.insert("default".into(), error("any other refusal").into());
        }
    }
}

/// What is not served yet.
struct Missing;

impl Modify for Missing {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for route in NOT_SERVED {
            let mut operation = OperationBuilder::new()
                .tag("not served yet")
                .summary(Some(format!("{}: not served yet", route.what)))
                .response("501", error("not served yet"));
            for name in route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
                operation = operation.parameter(
                    ParameterBuilder::new()
                        .name(name)
                        .parameter_in(ParameterIn::Path)
                        .required(Required::True)
                        .schema(Some(Object::with_type(Type::String))),
                );
            }
            let method = match route.method {
                "GET" => HttpMethod::Get,
                "POST" => HttpMethod::Post,
                "PUT" => HttpMethod::Put,
                "PATCH" => HttpMethod::Patch,
                _ => HttpMethod::Delete,
            };
            let item = PathItem::new(method, operation);
            match document.paths.paths.get_mut(route.path) {
                Some(known) => known.merge_operations(item),
                None => {
                    document.paths.paths.insert(route.path.to_owned(), item);
                }
            }
        }
        refused(document);
    }
}

fn error(description: &str) -> utoipa::openapi::Response {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Error"))).build();
    ResponseBuilder::new().description(description).content("application/json", content).build()
}
