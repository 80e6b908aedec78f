//! The JSON-RPC over WebSocket of the first SDKs (0.x), translated to the agent's calls.
