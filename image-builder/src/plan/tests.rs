//! Stages and steps of small Dockerfiles.

use super::*;

fn none() -> Contexts {
    Contexts::default()
}

fn parse(text: &str) -> Dockerfile {
    Dockerfile::parse("Dockerfile", text.as_bytes()).unwrap()
}

fn args(pairs: &[(&str, &str)]) -> BuildArgs {
    BuildArgs(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
}

fn plan(text: &str, given: &[(&str, &str)]) -> StagePlan {
    let mut base = ImageConfig::default();
    base.set_env("PATH", "/bin".into());
    base.cmd = Some(vec!["base".into()]);
    steps(&parse(text), 0, &args(given), &none(), &base, &StageArgs::default()).unwrap()
}

fn failure(text: &str, given: &[(&str, &str)]) -> String {
    let file = parse(text);
    match stages(&file, &args(given), &none(), None) {
        Err(error) => error.to_string(),
        Ok(_) => steps(&file, 0, &args(given), &none(), &ImageConfig::default(), &StageArgs::default())
            .unwrap_err()
            .to_string(),
    }
}

#[test]
fn only_the_needed_stages_are_planned() {
    let file = parse(
        "ARG base=debian\nFROM $base AS one\nFROM scratch AS unused\nFROM one AS two\nFROM alpine\nCOPY --from=TWO a b\n",
    );
    let all = stages(&file, &BuildArgs::default(), &none(), None).unwrap();
    assert_eq!(all.iter().map(|stage| stage.index).collect::<Vec<_>>(), [0, 2, 3]);
    assert_eq!(all[0].base, Base::Image("debian".parse().unwrap()));
    assert_eq!(all[1].base, Base::Stage(0));
    let one = stages(&file, &args(&[("base", "x:1")]), &none(), Some("one")).unwrap();
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].base, Base::Image("x:1".parse().unwrap()));
    assert_eq!(stages(&file, &BuildArgs::default(), &none(), Some("1")).unwrap()[0].base, Base::Scratch);
}

#[test]
fn variables_come_from_args_and_env() {
    let planned = plan(
        "FROM a\nARG v=1\nARG w\nENV x=$v y=${x:-none} PATH=/usr/games:$PATH\nWORKDIR /a/../$v\nWORKDIR b\nRUN cmd $v\n",
        &[("w", "given")],
    );
    let config = &planned.config;
    assert_eq!(config.env_value("x"), Some("1"));
    assert_eq!(config.env_value("y"), Some("none"), "values are those before the instruction");
    assert_eq!(config.env_value("PATH"), Some("/usr/games:/bin"));
    assert_eq!(config.workdir, "/1/b");
    let Action::Run(run) = &planned.steps[5].action else { panic!("{:?}", planned.steps) };
    assert_eq!(run.argv, ["/bin/sh", "-c", "cmd $v"], "the shell expands, not the plan");
    assert_eq!(run.workdir, "/1/b");
    let env: Vec<_> = run.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(env, ["v=1", "w=given", "PATH=/usr/games:/bin", "x=1", "y=none"]);
}

#[test]
fn env_wins_over_arg_and_globals_need_redeclaration() {
    let planned =
        plan("ARG g=global\nFROM a\nARG g\nARG x=arg\nENV x=env\nLABEL g=$g x=$x n=$TARGETOS\n", &[]);
    assert_eq!(planned.config.labels["g"], "global");
    assert_eq!(planned.config.labels["x"], "env");
    assert_eq!(planned.config.labels["n"], "");
    let planned = plan("ARG g=global\nFROM a\nARG TARGETOS\nLABEL g=$g n=$TARGETOS\n", &[]);
    assert_eq!(planned.config.labels["g"], "");
    assert_eq!(planned.config.labels["n"], "linux");
}

#[test]
fn entrypoint_drops_the_cmd_of_the_base_only() {
    assert_eq!(plan("FROM a\nENTRYPOINT [\"e\"]\n", &[]).config.cmd, None);
    let ours = plan("FROM a\nCMD [\"c\"]\nENTRYPOINT e\n", &[]).config;
    assert_eq!(ours.cmd, Some(vec!["c".into()]));
    assert_eq!(ours.entrypoint, Some(vec!["/bin/sh".into(), "-c".into(), "e".into()]));
    let shell = plan("FROM a\nSHELL [\"/bin/bash\", \"-ec\"]\nCMD x\n", &[]).config;
    assert_eq!(shell.cmd, Some(vec!["/bin/bash".into(), "-ec".into(), "x".into()]));
}

#[test]
fn copies_are_resolved() {
    let planned = plan(
        "FROM a\nWORKDIR /w\nARG f=x.txt\nCOPY --chmod=0640 --chown=u:g $f .\nCOPY a b d/\nCOPY <<x /y\n$f\nx\n",
        &[],
    );
    let copies: Vec<_> = planned
        .steps
        .iter()
        .filter_map(|step| if let Action::Copy(copy) = &step.action { Some(copy) } else { None })
        .collect();
    assert_eq!(copies[0].destination, "/w/");
    assert_eq!(copies[0].sources, [CopySource::Path("x.txt".into())]);
    assert_eq!(
        (copies[0].chmod.clone(), copies[0].chown.as_deref()),
        (Some(Chmod::Octal(0o640)), Some("u:g"))
    );
    assert_eq!(copies[1].destination, "/w/d/");
    assert_eq!(copies[2].sources, [CopySource::Inline { name: "x".into(), contents: "x.txt\n".into() }]);
}

#[test]
fn proxies_stay_out_of_the_environment_that_is_kept() {
    let planned = plan("FROM a\nRUN x\n", &[("http_proxy", "http://p")]);
    let Action::Run(run) = &planned.steps[0].action else { panic!() };
    assert_eq!(run.proxy_env, [("http_proxy".to_owned(), "http://p".to_owned())]);
    assert!(run.env.iter().all(|(name, _)| name != "http_proxy"));
    let unused = args(&[("http_proxy", ""), ("TYPO", "1")]).unused(&parse("FROM a\nARG typo\n"));
    assert_eq!(unused, ["TYPO"]);
}

#[test]
fn errors_name_the_line() {
    let cases = [
        "FROM $nothing",
        "FROM Debian",
        "FROM --platform=windows/amd64 a",
        "FROM a\nCOPY --from=1 a b",
        "FROM a\nCOPY --from=later a b\nFROM b AS later\nCOPY --from=0 a b",
        "FROM a\nCOPY a b /c",
        "FROM a\nCOPY --chmod=u+q a b",
        "FROM a\nEXPOSE 0",
        "FROM a\nEXPOSE 80/icmp",
        "FROM a\nEXPOSE 90-80",
        "FROM a\nENV a=${b",
        "FROM a\nLABEL a=${b:?required}",
        "FROM a\nWORKDIR $b",
    ];
    insta::assert_snapshot!(cases.map(|text| failure(text, &[])).join("\n"));
}
