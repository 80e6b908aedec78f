//! 429 for those who ask too often: a team by its key, whoever has none by the address.
//!
//! Who has a good key is never refused for what others do at the same address. `/health` is always answered: who watches the
//! gateway may stand behind the same proxy as who floods it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Extensions, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Control;
use crate::ApiError;
use crate::identity::TeamId;
use crate::metrics::{Limited, Metrics};
use crate::rate::{BURST_SECONDS, Buckets, Rate, Rates};
use crate::store::Team;

/// The bits of an IPv6 address that tell one site from another (RFC 6177): the rest is for its owner to choose.
const SITE_BITS: u32 = 64;

/// Where a request came from: an extension of it, set by the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// What was asked lately.
#[derive(Debug, Default)]
pub(super) struct Asked {
    teams: Buckets<TeamId>,
    addresses: Buckets<IpAddr>,
}

impl Asked {
    /// A request with that team's key.
    pub(super) fn by_team(&self, team: &Team, rates: Rates, metrics: &Metrics) -> Result<(), ApiError> {
        let rate = team.rate.unwrap_or(rates.team);
        self.teams.take(team.id.clone(), rate).map_err(|wait| {
            metrics.rate_limited(Limited::Team);
            too_many("this team", rate, wait)
        })
    }

    /// A request without a key that counts.
    pub(super) fn by_address(
        &self,
        extensions: &Extensions,
        rates: Rates,
        metrics: &Metrics,
    ) -> Result<(), ApiError> {
        // Of the server in this crate every request has one.
        let Some(Peer(peer)) = extensions.get() else { return Ok(()) };
        self.addresses.take(site(peer.ip()), rates.keyless).map_err(|wait| {
            metrics.rate_limited(Limited::Address);
            too_many("this address, without a valid key,", rates.keyless, wait)
        })
    }
}

/// Lets only so many requests to a route for everybody through.
pub(super) async fn keyless(State(control): State<Arc<Control>>, request: Request, next: Next) -> Response {
    if request.uri().path() != "/health"
        && let Err(error) =
            control.asked.by_address(request.extensions(), control.rates, &control.gateway.metrics)
    {
        return error.into_response();
    }
    next.run(request).await
}

fn too_many(who: &str, rate: Rate, wait: std::time::Duration) -> ApiError {
    // Whole seconds is what the header has, and what clients wait.
    let seconds = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX).saturating_add(1);
    let message = format!(
        "Rate limit exceeded: {who} may send {} requests a second, {BURST_SECONDS} times that at once; try again in {seconds} s",
        rate.requests()
    );
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).retry_after(seconds)
}

/// The address, or of an IPv6 address the site.
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let kept = address.to_bits() >> (128 - SITE_BITS) << (128 - SITE_BITS);
            Ipv6Addr::from_bits(kept).into()
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_site_are_one() {
        let site = |text: &str| site(text.parse().unwrap()).to_string();
        assert_eq!(site("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(site("192.0.2.7"), "192.0.2.7");
        assert_eq!(site("::ffff:192.0.2.7"), "192.0.2.7");
    }
}
