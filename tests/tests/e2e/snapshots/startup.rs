//! A template's start and ready command: run once, when it is made warm, or in each sandbox that boots.

use std::fs;

use e2e::{Channel, TestData, TestSandbox};
use serde_json::json;

use super::ask;

const PORT: u16 = 8000;

/// Says that it was started, and becomes the server.
const START: &str = "echo started >> /root/starts; exec python3 /root/serve.py 8000";

const READY: &str = "exec 3<>/dev/tcp/127.0.0.1/8000";

fn with_commands(data: &TestData, name: &str, start: &str, ready: &str) {
    data.copy_as("clones", name);
    TestData::edit(&data.template(name).join("template.json"), |template| {
        template["runtime"]["start_command"] = json!(start);
        template["runtime"]["ready_command"] = json!(ready);
    });
}

/// The start command has run once, is there under its tag, and has answered this often before.
async fn assert_served(sandbox: &TestSandbox, before: u64) {
    assert_eq!(sandbox.stdout("cat /root/starts").await, "started\nserve 8000\n");
    let listed = sandbox.client().processes().await.unwrap();
    let tagged: Vec<_> = listed.iter().filter(|process| process.tag.as_deref() == Some("start")).collect();
    assert_eq!(tagged.len(), 1, "{listed:?}");
    assert_eq!(u64::from(tagged[0].pid), ask(sandbox, PORT, "pid").await);
    assert_eq!(ask(sandbox, PORT, "count").await, before + 2);
}

#[tokio::test]
async fn a_templates_server_is_started_once_and_goes_on_in_every_sandbox() {
    let data = TestData::new();
    with_commands(&data, "served", START, READY);
    let warmed = data.warm("served");
    let phases: Vec<_> = warmed["phases"].as_array().unwrap().iter().map(|phase| &phase["name"]).collect();
    assert!(phases.contains(&&json!("startup")), "{warmed}");
    println!("template warm: {warmed}");

    // Of another process, as ever after.
    let one = TestSandbox::clone_of(&data, "served").start().await;
    println!("restored: {}", one.ready());
    assert_eq!((&one.state()["start"], &one.state()["generation"]), (&json!("cloned"), &json!(2)));
    assert_served(&one, 0).await;
    assert_served(&one, 2).await;
    // Another one has a server of its own, that goes on from the same moment.
    let two = TestSandbox::clone_of(&data, "served").start().await;
    assert_served(&two, 0).await;
    one.stop().await;
    two.stop().await;

    let cold = TestSandbox::clone_of(&data, "served").set("restore", "never").start().await;
    assert_eq!(cold.state()["start"], "booted");
    assert_served(&cold, 0).await;
    cold.stop().await;
}

#[tokio::test]
async fn a_start_command_that_fails_fails_the_start_with_its_words() {
    let data = TestData::new();
    with_commands(&data, "cold-oven", "echo the oven is cold >&2; exit 7", "sleep 0.2; false");
    let expected = "the template's start command ended with 7: the oven is cold";
    let said = data.try_warm("cold-oven").expect_err("it was warmed");
    assert!(said.contains(expected), "{said}");
    let left: Vec<_> = fs::read_dir(data.template("cold-oven").join("snapshots")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");

    let said = match TestSandbox::of(Channel::Serial).template(&data, "cold-oven").try_start().await {
        Ok(_) => panic!("it started"),
        Err(said) => said,
    };
    assert!(said.contains(expected), "{said}");
}
