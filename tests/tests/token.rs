//! `cpc token` and `cpc pki` on the server's host, without a server: what they print, whose files they write,
//! and what they leave alone.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tunnel_tests::lab::Programs;

/// The user that the server would run as.
const USER: u32 = 65_534;

/// A server's files, which go with the value. Nothing is started.
struct Host(PathBuf);

impl Drop for Host {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Host {
    fn new(test: &str) -> Result<Self> {
        let name = format!("cpc-token-{test}-{}", std::process::id());
        let host = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(&host.0)?;
        fs::set_permissions(&host.0, Permissions::from_mode(0o755))?;
        let config = host.path("server.yaml");
        let text = "state_dir: state\njoin: {ca: pki}\n\
                    tls: {cert: s1/server.crt, key: s1/server.key, ca: s1/ca.crt}\n";
        fs::write(config, text)?;
        host.succeeds(&["pki", "init", "--dir", "pki"])?;
        host.succeeds(&["pki", "server", "--dir", "pki", "--id", "s1", "--out", "s1"])?;
        Ok(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn cpc(&self, arguments: &[&str]) -> Result<(bool, String)> {
        let mut cpc = Command::new(Programs::of_this_test()?.cpc);
        cpc.args(arguments).current_dir(&self.0);
        let output = cpc.env("CPC_CONFIG", "server.yaml").output()?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8(said)?))
    }

    fn succeeds(&self, arguments: &[&str]) -> Result<String> {
        let (done, said) = self.cpc(arguments)?;
        ensure!(done, "{arguments:?}: {said}");
        Ok(said)
    }

    fn fails(&self, arguments: &[&str], why: &str) -> Result<()> {
        let (done, said) = self.cpc(arguments)?;
        ensure!(!done && said.contains(why), "{arguments:?}: {said}");
        Ok(())
    }

    fn book(&self) -> Result<Value> {
        let text = fs::read(self.path("state/join/join.json"))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

fn owner(path: &Path) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.uid())
}

const CREATE: [&str; 6] = ["token", "create", "--node", "w1", "--ip", "10.99.1.2"];

/// The command that is printed asks for the addresses that the token names, since a worker without `--ip`
/// asks for the one that it reaches the server from.
#[test]
fn the_printed_command_asks_for_what_the_token_allows() -> Result<()> {
    let host = Host::new("command")?;
    let both = host.succeeds(&[&CREATE[..], &["--ip", "fd00::2"]].concat())?;
    ensure!(
        both.contains("--node w1 --ip 10.99.1.2 --ip fd00::2"),
        "{both}"
    );
    let mapped = [
        "token",
        "create",
        "--node",
        "w*",
        "--ip",
        "::ffff:10.99.1.3",
    ];
    let mapped = host.succeeds(&mapped)?;
    ensure!(mapped.trim().ends_with("--ip 10.99.1.3"), "{mapped}");
    let range = host.succeeds(&[&CREATE[..], &["--ip", "10.98.0.0/16"]].concat())?;
    ensure!(!range.contains("--ip"), "{range}");
    let stars = "*-".repeat(200);
    for pattern in ["w 1", "w/1", &stars] {
        let create = ["token", "create", "--node", pattern, "--ip", "10.99.1.2"];
        host.fails(&create, "no pattern of names")?;
    }
    Ok(())
}

/// A book with tokens that look over, as by a clock that is ahead: none is erased by `cpc token`, and one
/// that was made in the future is pointed out.
#[test]
fn no_token_is_erased_by_the_clock() -> Result<()> {
    let host = Host::new("clock")?;
    host.succeeds(&CREATE)?;
    let mut book = host.book()?;
    let tokens = book["tokens"].as_object_mut().context("no tokens")?;
    let (id, token) = tokens.iter_mut().next().context("no token")?;
    let id = id.clone();
    token["expires"] = "2020-01-01T00:00:00Z".into();
    token["created"] = "2019-12-31T23:00:00Z".into();
    let held = r#"{"w1": [{"addresses": ["10.99.1.2"], "key": "sha256:00", "serial": "4A", "token": "t",
        "since": "2019-12-31T23:00:00Z", "until": "2020-01-01T00:00:00Z"}]}"#;
    book["issued"] = serde_json::from_str(held)?;
    fs::write(host.path("state/join/join.json"), book.to_string())?;
    let said = host.succeeds(&CREATE)?;
    ensure!(!said.contains("clock"), "{said}");
    let mut book = host.book()?;
    ensure!(!book["tokens"][&id].is_null(), "{book:#}");
    ensure!(book["issued"]["w1"][0]["serial"] == "4A", "{book:#}");
    book["tokens"][&id]["created"] = "2200-01-01T00:00:00Z".into();
    fs::write(host.path("state/join/join.json"), book.to_string())?;
    let said = host.succeeds(&CREATE)?;
    ensure!(
        said.contains("2200-01-01T00:00:00Z") && said.contains("clock"),
        "{said}"
    );
    Ok(())
}

/// Certificates of `cpc pki` are on record, and can be released.
#[test]
fn what_was_issued_by_hand_is_listed_and_released() -> Result<()> {
    let host = Host::new("issued")?;
    let agent = [
        "pki",
        "agent",
        "--dir",
        "pki",
        "--node",
        "w1",
        "--ip",
        "10.99.1.2",
    ];
    host.succeeds(&[&agent[..], &["--out", "w1"]].concat())?;
    host.succeeds(&[&agent[..], &["--out", "again"]].concat())?;
    host.fails(&[&agent[..], &["--out", "w1"]].concat(), "exists")?;
    let issued = || -> Result<Vec<Value>> {
        let text = host.succeeds(&["token", "issued", "--json"])?;
        Ok(serde_json::from_str(&text)?)
    };
    let before = issued()?;
    ensure!(before.len() == 2 && before[0]["node"] == "w1", "{before:?}");
    ensure!(before[0]["holds_name"] == true, "{before:?}");
    host.fails(&["token", "release", "w2"], "cpc token issued")?;
    host.succeeds(&["token", "release", "--ip", "10.99.1.2"])?;
    let after = issued()?;
    ensure!(after[0]["holds_name"] == true, "{after:?}");
    ensure!(
        after[0]["holds_addresses"]
            .as_array()
            .context("none")?
            .is_empty()
    );
    let said = host.succeeds(&["token", "release", "w1"])?;
    let serial = before[0]["serial"].as_str().context("no serial")?;
    ensure!(
        said.contains(&format!("serial:{serial} in tls.revoked")),
        "{said}"
    );
    ensure!(issued()?.iter().all(|it| it["holds_name"] == false));
    let table = host.succeeds(&["token", "issued"])?;
    ensure!(
        table.contains("released") && table.contains("pki"),
        "{table}"
    );
    Ok(())
}

/// Links that a server's user plants in directories of its own lead root nowhere; what root writes there is
/// that user's.
#[test]
fn links_of_a_servers_user_lead_root_nowhere() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        ensure!(std::env::var_os("CI").is_none(), "CI runs this as root");
        println!("skipped: only root can be led elsewhere");
        return Ok(());
    }
    let host = Host::new("links")?;
    let victim = host.path("victim");
    fs::write(&victim, "root's")?;
    fs::set_permissions(&victim, Permissions::from_mode(0o600))?;
    let elsewhere = host.path("elsewhere");
    fs::create_dir(&elsewhere)?;
    let users = |name: &str| -> Result<()> {
        fs::create_dir(host.path(name))?;
        Ok(chown(host.path(name), Some(USER), Some(USER))?)
    };
    ["state", "state/join", "users"]
        .into_iter()
        .try_for_each(users)?;

    let lock = host.path("state/join/join.lock");
    symlink(&victim, &lock)?;
    host.fails(&CREATE, "is a link")?;
    fs::remove_file(&lock)?;
    fs::hard_link(&victim, &lock)?;
    symlink(&victim, host.path("state/join/.join.json.new"))?;
    host.succeeds(&CREATE)?;
    fs::remove_file(&lock)?;
    host.succeeds(&CREATE)?;
    for file in ["join.lock", "join.json"] {
        ensure!(
            owner(&host.path("state/join").join(file))? == USER,
            "{file}"
        );
    }
    // The directory itself.
    fs::rename(host.path("state/join"), host.path("state/aside"))?;
    symlink(&elsewhere, host.path("state/join"))?;
    host.fails(&CREATE, "does not follow")?;

    // A certificate, a CA and the manual, put where a link leads.
    symlink(&elsewhere, host.path("users/way"))?;
    let agent = ["pki", "agent", "--dir", "pki", "--node", "w1", "--out"];
    host.fails(&[&agent[..], &["users/way"]].concat(), "does not follow")?;
    host.fails(&["pki", "init", "--dir", "users/way/ca"], "does not follow")?;
    host.fails(&["man", "users/way"], "does not follow")?;
    symlink(&victim, host.path("users/cpc.1"))?;
    host.succeeds(&["man", "users"])?;
    host.succeeds(&[&agent[..], &["users/w1"]].concat())?;
    for file in ["cpc.1", "w1", "w1/agent.key", "w1/agent.crt", "w1/ca.crt"] {
        ensure!(owner(&host.path("users").join(file))? == USER, "{file}");
    }
    ensure!(
        fs::read_dir(&elsewhere)?.next().is_none(),
        "something was put elsewhere"
    );
    ensure!(
        fs::read(&victim)? == b"root's" && owner(&victim)? == 0,
        "it was changed"
    );
    Ok(())
}
