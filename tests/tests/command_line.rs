//! The first contact with the program: help, completions, manual pages, and errors about wrong
//! configuration and certificates. None of it needs root.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use tunnel_tests::lab::Programs;

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("cpc-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cpc(arguments: &[&str]) -> Result<Output> {
    let mut cpc = Command::new(Programs::of_this_test()?.cpc);
    Ok(cpc.args(arguments).env_remove("CPC_CONFIG").output()?)
}

/// The output of a program that must succeed and have nothing to complain about.
fn quiet(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && complaint.is_empty(),
        "{command:?}: {} {complaint}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Every subcommand, found by reading the help of the one above it.
fn subcommands(above: &[String]) -> Result<Vec<Vec<String>>> {
    let mut arguments: Vec<_> = above.iter().map(String::as_str).collect();
    arguments.push("--help");
    let output = cpc(&arguments)?;
    let help = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{arguments:?}: {}", output.status);
    ensure!(help.contains("Usage: cpc"), "{arguments:?}: {help}");
    // A sentence on what it is for stands before the usage.
    let purpose = help.split("Usage:").next().unwrap_or_default();
    ensure!(purpose.trim().len() > 15, "{arguments:?}: {help}");
    let mut all = vec![above.to_vec()];
    if let Some((_, list)) = help.split_once("\nCommands:\n") {
        let names = list.lines().take_while(|line| line.starts_with("  "));
        let names = names.filter_map(|line| line.split_whitespace().next());
        for name in names.filter(|name| *name != "help") {
            all.extend(subcommands(&[above, &[name.to_owned()]].concat())?);
        }
    }
    Ok(all)
}

/// Help is there for each subcommand at every depth.
#[test]
fn every_subcommand_explains_itself() -> Result<()> {
    let all = subcommands(&[])?;
    for expected in [
        "server",
        "agent",
        "proxy-server",
        "proxy-agent",
        "status",
        "log",
        "completions",
        "man",
    ] {
        ensure!(
            all.contains(&vec![expected.to_owned()]),
            "no {expected} in {all:?}"
        );
    }
    for (command, below) in [("config", 2), ("pki", 5), ("redirect", 4), ("token", 5)] {
        let found = all
            .iter()
            .filter(|it| it.len() == 2 && it[0] == command)
            .count();
        assert_eq!(found, below, "{command}: {all:?}");
    }
    Ok(())
}

/// Completions are scripts that their shells accept, and bash's knows the subcommands.
#[test]
fn completions_load() -> Result<()> {
    let folder = Folder::new("completions")?;
    for shell in ["bash", "zsh", "fish"] {
        let output = cpc(&["completions", shell])?;
        ensure!(
            output.status.success() && output.stdout.len() > 1000,
            "{shell}"
        );
        let script = folder.path().join(shell);
        fs::write(&script, &output.stdout)?;
        if installed(shell) {
            quiet(Command::new(shell).arg("-n").arg(&script))?;
        }
    }
    let complete = "source \"$0\"; COMP_WORDS=(cpc sta); COMP_CWORD=1; _cpc cpc sta cpc; \
                    echo \"${COMPREPLY[@]}\"";
    let script = folder.path().join("bash");
    let found = quiet(Command::new("bash").args(["-c", complete]).arg(&script))?;
    assert_eq!(found.trim(), "status");
    Ok(())
}

/// A page for each subcommand, which the formatter renders without a warning.
#[test]
fn manual_pages_render() -> Result<()> {
    let folder = Folder::new("man")?;
    let path = folder.path().to_str().context("not UTF-8")?;
    ensure!(cpc(&["man", path])?.status.success());
    for page in [
        "cpc",
        "cpc-server",
        "cpc-agent",
        "cpc-status",
        "cpc-pki",
        "cpc-proxy-server",
        "cpc-proxy-agent",
    ] {
        let file = folder.path().join(format!("{page}.1"));
        let text = fs::read_to_string(&file).context(page)?;
        ensure!(
            text.contains(".TH") && text.contains(".SH SYNOPSIS"),
            "{page}"
        );
        if installed("groff") {
            let mut groff = Command::new("groff");
            let text = quiet(groff.args(["-man", "-Tutf8", "-P-cbou", "-ww"]).arg(&file))?;
            ensure!(text.contains("SYNOPSIS"), "{page}: {text}");
        }
    }
    Ok(())
}

/// An error in a configuration names the file, the line and the key.
#[test]
fn errors_in_configuration_say_where() -> Result<()> {
    let folder = Folder::new("config")?;
    let file = folder.path().join("config.yaml");
    let path = file.to_str().context("not UTF-8")?;
    let server: [(&str, &[&str]); 10] = [
        ("version: 1\nlissen: 1.2.3.4:5\n", &["line 2", "lissen"]),
        ("version: 2\n", &["line 1", "version 2"]),
        ("version: 1\nlisten: nowhere\n", &["line 2", "listen"]),
        ("version: 1\nlimits:\n  drain: soon\n", &["line 3", "drain"]),
        (
            "version: 1\npolicy:\n  grants:\n    - identity: spiffe://a/agent/b\n      cidrs: [10.0.0.0/33]\n",
            &["line 5", "cidrs"],
        ),
        (
            "version: 1\nfrontends:\n  http_connect:\n    - unix: /tmp/x\n      mod: \"0660\"\n",
            &["line 5", "mod"],
        ),
        (
            "version: 1\nfrontends:\n  http_connect:\n    - tcp: 127.0.0.1:1\n      cert: a\n      key: b\n",
            &["http_connect", "client_ca"],
        ),
        (
            "version: 1\nredirect:\n  attachments:\n    - name: a\n      cgroup: /a\n      capture: [{cidr: 10.0.0.0/8, ports: [70000]}]\n",
            &["line 6", "ports"],
        ),
        (
            "version: 1\nredirect:\n  attachments:\n    - name: a\n      cgroup: /a\n      capture: []\n      shortcut: false\n",
            &["line 7", "was removed", "delete the key `shortcut`"],
        ),
        ("version: 1\nserver_count: 0\n", &["line 2", "server_count"]),
    ];
    let agent: [(&str, &[&str]); 3] = [
        (
            "version: 1\nservers: [\"cp\"]\n",
            &["line 2", "servers[0]", "host:port"],
        ),
        ("version: 1\nallow:\n  - {cidr: x}\n", &["line 3", "cidr"]),
        ("version: 1\n\tservers: []\n", &["line 1 column 10", "tab"]),
    ];
    let server = server.iter().map(|case| ("server", case));
    for (role, (text, pieces)) in server.chain(agent.iter().map(|case| ("agent", case))) {
        fs::write(&file, text)?;
        let output = cpc(&[role, "--config", path])?;
        let said = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{text}: {said}");
        for piece in pieces.iter().chain(&[path]) {
            ensure!(said.contains(piece), "{text}\nno {piece:?} in: {said}");
        }
    }
    Ok(())
}

/// Runs `cpc config` without the configuration of this process.
fn cpc_config(arguments: &[&str], environment: &[(&str, &str)]) -> Result<(Option<i32>, String)> {
    let mut cpc = Command::new(Programs::of_this_test()?.cpc);
    cpc.arg("config").args(arguments).env_remove("CPC_CONFIG");
    let output = cpc.envs(environment.iter().copied()).output()?;
    let (printed, said) = (output.stdout, output.stderr);
    // One of the two, never both.
    ensure!(printed.is_empty() != said.is_empty(), "{arguments:?}");
    let text = String::from_utf8([printed, said].concat())?;
    Ok((output.status.code(), text))
}

const SERVER: &str = "\
version: 1
listen: 127.0.0.1:0
server_id: s1
state_dir: state
tls: {cert: s1/server.crt, key: s1/server.key, ca: ca/ca.crt}
frontends:
  http_connect:
    - unix: connect.sock
      mode: \"0600\"
      allow: [{name: \"*.svc\", ports: [443, \"8000-8100\"]}]
policy:
  grants:
    - {identity: \"spiffe://cluster.local/agent/*\", names: [web.svc]}
    - {identity: \"spiffe://cluster.local/agent/b\", cidrs: [10.0.0.0/8]}
limits:
  drain: 1m 30s
admin: 127.0.0.1:0
log: {filter: info}
";

const AGENT: &str = "\
version: 1
servers:
  - 127.0.0.1:1
  - {address: \"cp.example:8132\", protocol: quic}
tls: {cert: w1/agent.crt, key: w1/agent.key, ca: ca/ca.crt}
serve:
  names:
    - web.svc
    - \"*.svc\"
allow:
  - {cidr: 10.0.0.0/8, ports: [\"1-1024\"]}
limits: {drain: forever}
admin: 127.0.0.1:0
";

/// `cpc config check` takes what a start takes and names the line of what it does not take.
#[test]
fn a_configuration_is_checked_without_a_start() -> Result<()> {
    let folder = Folder::new("config-check")?;
    let file = folder.path().join("config.yaml");
    let path = file.to_str().context("not UTF-8")?;
    for (role, text) in [("server", SERVER), ("agent", AGENT)] {
        fs::write(&file, text)?;
        let ok = (Some(0), format!("{path}: ok\n"));
        assert_eq!(cpc_config(&["check", path], &[])?, ok);
        let told = ["check", "--role", role, path];
        // The environment of a start does not count.
        assert_eq!(cpc_config(&told, &[("CPC_SHARDS", "0")])?, ok);
        let other = if role == "server" { "agent" } else { "server" };
        let (code, said) = cpc_config(&["check", "--role", other, path], &[])?;
        ensure!(code == Some(1) && said.contains("unknown field"), "{said}");
    }
    type Case = (
        &'static str,
        &'static str,
        &'static str,
        &'static [&'static str],
    );
    let wrong: [Case; 12] = [
        (
            SERVER,
            "1m 30s",
            "2days",
            &["line 16", "limits.drain", "24 h"],
        ),
        (SERVER, "1m 30s", "soon", &["line 16", "drain"]),
        (SERVER, "  drain", "  draim", &["line 16", "draim"]),
        (
            SERVER,
            "names: [web.svc]",
            "names: [\"a b\"]",
            &["line 13", "policy.grants[0].names"],
        ),
        (
            SERVER,
            "spiffe://cluster.local/agent/b",
            "b",
            &["line 14", "policy.grants[1].identity"],
        ),
        (
            SERVER,
            ", ca: ca/ca.crt",
            "",
            &["line 5", "tls.ca", "cpc pki"],
        ),
        (
            SERVER,
            "filter: info",
            "filter: a=b=c",
            &["line 18", "log.filter", "info,cpc=debug"],
        ),
        (SERVER, "\"0600\"", "600", &["0660"]),
        (
            AGENT,
            "cp.example:8132",
            "cp.example",
            &["line 4", "servers[1]", "host:port"],
        ),
        (AGENT, "\"*.svc\"", "\"*\"", &["line 9", "serve.names[1]"]),
        (
            AGENT,
            ", ca: ca/ca.crt",
            "",
            &["line 5", "tls.ca", "cpc pki"],
        ),
        (AGENT, "quic", "auto", &["konnectivity", "is needed"]),
    ];
    for (text, right, wrong, pieces) in wrong {
        ensure!(text.contains(right), "{right:?} is not in {text}");
        fs::write(&file, text.replace(right, wrong))?;
        let role = if text == SERVER { "server" } else { "agent" };
        let (code, said) = cpc_config(&["check", path], &[])?;
        assert_eq!(code, Some(1), "{wrong}: {said}");
        for piece in pieces.iter().chain(&[path]) {
            ensure!(said.contains(piece), "{wrong}\nno {piece:?} in: {said}");
        }
        let start = cpc(&[role, "--config", path])?;
        assert_eq!(
            String::from_utf8(start.stderr)?,
            said,
            "a start says the same"
        );
    }
    for text in ["version: 1\n", "servers: []\nlisten: a\n"] {
        fs::write(&file, text)?;
        let (code, said) = cpc_config(&["check", path], &[])?;
        ensure!(code == Some(1) && said.contains("--role server"), "{said}");
    }
    let (code, said) = cpc_config(&["check", "/nonexistent"], &[])?;
    ensure!(code == Some(1) && said.contains("/nonexistent"), "{said}");
    Ok(())
}

/// An error in a flag or in the environment names no line of the file.
#[test]
fn a_wrong_value_that_was_given_is_said_to_be() -> Result<()> {
    let folder = Folder::new("config-given")?;
    let file = folder.path().join("config.yaml");
    let path = file.to_str().context("not UTF-8")?;
    fs::write(&file, format!("{SERVER}shards: 2\n"))?;
    let (code, said) = cpc_config(&["show", path], &[("CPC_SHARDS", "0")])?;
    ensure!(
        code == Some(1) && said.contains("in the environment"),
        "{said}"
    );
    ensure!(!said.contains("line"), "{said}");
    let (code, said) = cpc_config(&["show", path, "--", "--shards", "0"], &[])?;
    ensure!(code == Some(1) && said.contains("by a flag"), "{said}");
    Ok(())
}

/// `cpc config show` prints what file, environment and flags come to, as a file that means the same
/// wherever it lies, and that programs start with.
#[test]
fn what_is_in_force_is_a_configuration_again() -> Result<()> {
    let folder = Folder::new("config-show")?;
    let elsewhere = Folder::new("config-shown")?;
    let path = |name: &str| -> Result<String> {
        let path = folder.path().join(name);
        Ok(path.to_str().context("not UTF-8")?.to_owned())
    };
    let pki = |arguments: &[&str]| -> Result<()> {
        let output = cpc(&[&["pki"], arguments].concat())?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    let (ca, s1, w1) = (&path("ca")?, &path("s1")?, &path("w1")?);
    pki(&["init", "--dir", ca])?;
    pki(&["server", "--dir", ca, "--id", "s1", "--out", s1])?;
    pki(&["agent", "--dir", ca, "--node", "w1", "--out", w1])?;
    for (role, text, up) in [
        ("server", SERVER, "server is up"),
        ("agent", AGENT, "agent is up"),
    ] {
        let file = &path("config.yaml")?;
        fs::write(file, text)?;
        let environment = [("CPC_SHARDS", "1"), ("CPC_LOG_FORMAT", "json")];
        let flags = ["show", file, "--", "--engine", "epoll"];
        let (code, shown) = cpc_config(&flags, &environment)?;
        assert_eq!(code, Some(0), "{shown}");
        let certificate = path(if role == "server" {
            "s1/server.crt"
        } else {
            "w1/agent.crt"
        })?;
        for piece in [
            "shards: 1\n",
            "format: json\n",
            "engine: epoll\n",
            // A default.
            "max_mtu: 9000\n",
            &certificate,
        ] {
            ensure!(shown.contains(piece), "no {piece:?} in: {shown}");
        }
        ensure!(!shown.contains("PRIVATE"), "{shown}");
        let again = elsewhere.path().join("shown.yaml");
        let again = again.to_str().context("not UTF-8")?;
        fs::write(again, &shown)?;
        let ok = (Some(0), format!("{again}: ok\n"));
        assert_eq!(cpc_config(&["check", again], &[])?, ok);
        assert_eq!(cpc_config(&["show", again], &[])?.1, shown);
        starts(&[role, "--config", again], up)?;
    }
    let (code, said) = cpc_config(&["show"], &[])?;
    ensure!(code == Some(1) && said.contains("--role"), "{said}");
    let defaults = cpc_config(&["show", "--role", "agent"], &[("CPC_SERVERS", "a:1")])?.1;
    ensure!(defaults.contains("tls.cert"), "{defaults}");
    Ok(())
}

/// Starts a program and ends it once it has said that it is up.
fn starts(arguments: &[&str], up: &str) -> Result<()> {
    let mut cpc = Command::new(Programs::of_this_test()?.cpc);
    cpc.args(arguments).env_remove("CPC_CONFIG");
    let mut started = cpc.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let stderr = started.stderr.take().context("no standard error")?;
    let mut said = Vec::new();
    let mut is_up = false;
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        is_up = line.contains(up);
        said.push(line);
        if is_up {
            break;
        }
    }
    started.kill()?;
    started.wait()?;
    ensure!(is_up, "{arguments:?}: {}", said.join("\n"));
    Ok(())
}

/// Neither program starts with a certificate for another role, nor with a key that is not the
/// certificate's; what it says names the file.
#[test]
fn a_certificate_for_something_else_is_refused_at_the_start() -> Result<()> {
    let folder = Folder::new("roles")?;
    let path = |name: &str| -> Result<String> {
        Ok(folder
            .path()
            .join(name)
            .to_str()
            .context("not UTF-8")?
            .to_owned())
    };
    let ca = path("ca")?;
    let issue = |subcommand: &str, arguments: &[&str]| -> Result<()> {
        let output = cpc(&[&["pki", subcommand, "--dir", &ca], arguments].concat())?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    issue("init", &[])?;
    issue("server", &["--id", "s1", "--out", &path("s1")?])?;
    issue("agent", &["--node", "w1", "--out", &path("w1")?])?;
    issue("client", &["--name", "c1", "--out", &path("c1")?])?;
    let refused = |role: &str, cert: &str, key: &str| -> Result<String> {
        let state = path("state")?;
        let (cert, key, ca) = (path(cert)?, path(key)?, path("ca/ca.crt")?);
        let mut arguments = vec![role, "--cert", &cert, "--key", &key, "--ca", &ca];
        // Tests run as root: nothing here may be bound or attached before it is refused.
        arguments.extend(match role {
            "server" => ["--state-dir", &state],
            _ => ["--server", "127.0.0.1:1"],
        });
        arguments.extend(["--admin", "127.0.0.1:0"]);
        let output = cpc(&arguments)?;
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        Ok(String::from_utf8(output.stderr)?)
    };
    for (role, wrong) in [
        ("server", "w1/agent"),
        ("server", "c1/client"),
        ("agent", "s1/server"),
        ("agent", "c1/client"),
    ] {
        let said = refused(role, &format!("{wrong}.crt"), &format!("{wrong}.key"))?;
        let needed = format!("needs a certificate for the role {role}");
        ensure!(
            said.contains(&format!("{wrong}.crt")) && said.contains(&needed),
            "{said}"
        );
    }
    let said = refused("server", "s1/server.crt", "w1/agent.key")?;
    ensure!(
        said.contains("w1/agent.key") && said.contains("the key is not that of"),
        "{said}"
    );
    Ok(())
}

/// Nothing that exists is overwritten, and what can't be made is refused without a trace.
#[test]
fn issuing_is_careful() -> Result<()> {
    let folder = Folder::new("pki")?;
    let path = folder.path().to_str().context("not UTF-8")?;
    let ca = &format!("{path}/ca");
    let said = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let output = cpc(arguments)?;
        Ok((output.status.code(), String::from_utf8(output.stderr)?))
    };
    // Beyond the year 9999 a certificate has no date.
    let (code, text) = said(&["pki", "init", "--dir", ca, "--days", "4000000000"])?;
    ensure!(
        code == Some(2) && text.contains("--days"),
        "{code:?} {text}"
    );
    ensure!(!folder.path().join("ca").exists());
    assert_eq!(said(&["pki", "init", "--dir", ca])?.0, Some(0));
    let key = fs::read(folder.path().join("ca/ca.key"))?;
    let (code, text) = said(&["pki", "init", "--dir", ca])?;
    ensure!(
        code == Some(1) && text.contains("ca.key exists"),
        "{code:?} {text}"
    );
    assert_eq!(fs::read(folder.path().join("ca/ca.key"))?, key);

    let out = &format!("{path}/w1");
    let issue = ["pki", "agent", "--dir", ca, "--node", "w1", "--out", out];
    fs::create_dir_all(out)?;
    fs::write(format!("{out}/agent.crt"), "precious")?;
    let (code, text) = said(&issue)?;
    ensure!(
        code == Some(1) && text.contains("agent.crt exists"),
        "{code:?} {text}"
    );
    assert_eq!(fs::read_to_string(format!("{out}/agent.crt"))?, "precious");
    ensure!(
        !Path::new(&format!("{out}/agent.key")).exists(),
        "a key without a certificate"
    );

    let (code, text) = said(&["pki", "agent", "--dir", ca, "--node", "../w1", "--out", out])?;
    ensure!(
        code == Some(1) && text.contains("is no name"),
        "{code:?} {text}"
    );
    Ok(())
}
