//! What a template's snapshot and a paused sandbox are to an orchestrator: through the sandbox folder alone.

mod fit;
mod park;
mod pause;
mod startup;

use e2e::TestSandbox;
use e2e::process::timely;
use tokio::io::AsyncReadExt;

/// What a server of the image `clones` answers to a question.
pub(crate) async fn ask(sandbox: &TestSandbox, port: u16, question: &str) -> u64 {
    let asking = async {
        let mut stream = sandbox.client().connect_port(port).await.expect("the server listens");
        tokio::io::AsyncWriteExt::write_all(&mut stream, format!("{question}\n").as_bytes())
            .await
            .expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");
        answer
    };
    timely(question, asking).await.trim().parse().expect("a number")
}
