//! Requests to a sandbox's ports, its agent's among them: routed, authorised, streamed.
