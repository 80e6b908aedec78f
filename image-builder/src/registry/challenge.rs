//! `WWW-Authenticate`: what a registry wants to know (RFC 9110, section 11.6.1).

/// The longest header that is looked at.
const MAX_HEADER: usize = 8 << 10;

/// How a registry wants somebody to say who they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// With a name and a password.
    Basic,
    /// With a token of another service (distribution's "token authentication").
    Bearer {
        /// The address of the service.
        realm: String,
        /// What the service calls the registry.
        service: Option<String>,
        /// What the token must allow.
        scope: Option<String>,
    },
}

/// The challenge in these headers that we can meet: Bearer before Basic. A header may hold several.
pub(super) fn challenge<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let all: Vec<_> = headers.filter(|header| header.len() <= MAX_HEADER).flat_map(parse).collect();
    let bearer = all.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
    bearer.or(all.first()).cloned()
}

fn parse(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut rest = header.trim_start_matches([' ', ',']);
    while !rest.is_empty() {
        let (scheme, behind) = token(rest);
        let mut parameters = Vec::new();
        rest = behind.trim_start();
        loop {
            rest = rest.trim_start_matches([' ', ',', '\t']);
            let (name, behind) = token(rest);
            // A word without `=` begins the next challenge.
            let Some(value) = behind.trim_start().strip_prefix('=').filter(|_| !name.is_empty()) else {
                break;
            };
            let (value, behind) = value_of(value.trim_start());
            parameters.push((name.to_ascii_lowercase(), value));
            rest = behind;
        }
        let parameter =
            |wanted: &str| parameters.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
        match scheme.to_ascii_lowercase().as_str() {
            "basic" => found.push(Challenge::Basic),
            "bearer" => {
                if let Some(realm) = parameter("realm") {
                    found.push(Challenge::Bearer {
                        realm,
                        service: parameter("service"),
                        scope: parameter("scope"),
                    });
                }
            }
            // What is no token at all cannot be skipped.
            "" => return found,
            _ => {}
        }
    }
    found
}

/// The characters that a name is of, and the rest.
fn token(text: &str) -> (&str, &str) {
    let end = text.find(|character: char| {
        !(character.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(character))
    });
    text.split_at(end.unwrap_or(text.len()))
}

/// A quoted string or a name, and the rest.
fn value_of(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = token(text);
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[index + 1..]),
            '\\' => value.extend(characters.next().map(|(_, character)| character)),
            character => value.push(character),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn headers_of_real_registries_are_read() {
        let one = |header: &str| challenge([header].into_iter());
        assert_eq!(
            one(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/debian:pull,push""#
            ),
            bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:library/debian:pull,push")
            )
        );
        assert_eq!(one("Basic realm=\"Registry Realm\""), Some(Challenge::Basic));
        assert_eq!(one("basic"), Some(Challenge::Basic));
        assert_eq!(
            one("Basic realm=x, BEARER  realm = \"a \\\"b\\\"\" , service=s"),
            bearer("a \"b\"", Some("s"), None)
        );
        assert_eq!(challenge(["Negotiate", "Basic realm=x"].into_iter()), Some(Challenge::Basic));
        for none in ["", "Bearer", "Bearer service=x", "Digest realm=x", "=", "\"", "Bearer realm", ",,,"] {
            assert_eq!(one(none), None, "{none:?}");
        }
        let long = format!("Bearer realm=\"{}\"", "x".repeat(MAX_HEADER));
        assert_eq!(one(&long), None);
    }

    proptest::proptest! {
        #[test]
        fn any_header_ends_in_an_answer(header in "[ -~]{0,200}") {
            let _ = challenge([header.as_str()].into_iter());
        }
    }
}
