//! The seccomp profiles of `deploy/seccomp`, and the units beside which they must stay.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use seccompiler::{BpfProgram, compile_from_json};
use serde_json::{Value, json};

/// System calls of the laboratory after the filter is in force: each program has its own session.
const LABORATORY: &str = "setsid";
/// The calls of io_uring, which the profiles leave out.
pub(crate) const IO_URING: [&str; 3] = ["io_uring_enter", "io_uring_register", "io_uring_setup"];

pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// A profile in the format of the OCI's runtime specification.
pub(crate) struct Profile(Value);

impl Profile {
    /// Returns the profile of `cpc server`, `cpc agent` or `cpc keeper`.
    pub(crate) fn of(role: &str) -> Result<Self> {
        let file = deploy().join(format!("seccomp/cpc-{role}.json"));
        Ok(Self(serde_json::from_str(&fs::read_to_string(file)?)?))
    }

    /// With further calls allowed, as an administrator would write it.
    pub(crate) fn and(mut self, names: &[&str]) -> Result<Self> {
        let rules = self.0["syscalls"].as_array_mut().context("no rules")?;
        rules.push(json!({"names": names, "action": "SCMP_ACT_ALLOW"}));
        Ok(self)
    }

    fn rules(&self) -> Result<&Vec<Value>> {
        self.0["syscalls"].as_array().context("no rules")
    }

    /// Every call that it has a rule for.
    pub(crate) fn names(&self) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for rule in self.rules()? {
            for name in names(rule)? {
                ensure!(all.insert(name.to_owned()), "{name} stands there twice");
            }
        }
        Ok(all)
    }

    /// Compiles the profile to programs for the kernel, which asks all of them: one for each error
    /// number.
    pub(crate) fn compile(&self) -> Result<Vec<BpfProgram>> {
        let wanted = |key: &str, value: &Value| ensure_is(&self.0[key], value, key);
        wanted("defaultAction", &json!("SCMP_ACT_ERRNO"))?;
        wanted("defaultErrnoRet", &json!(libc::EPERM))?;
        let mut allowed = vec![json!({"syscall": LABORATORY})];
        let mut programs = Vec::new();
        for rule in self.rules()? {
            let mut conditions = Vec::new();
            for condition in rule["args"].as_array().into_iter().flatten() {
                ensure_is(&condition["op"], &json!("SCMP_CMP_MASKED_EQ"), "op")?;
                conditions.push(json!({
                    "index": condition["index"],
                    "type": "qword",
                    "op": {"masked_eq": condition["value"]},
                    "val": condition["valueTwo"],
                }));
            }
            let refused = rule["action"] == "SCMP_ACT_ERRNO";
            if !refused {
                ensure_is(&rule["action"], &json!("SCMP_ACT_ALLOW"), "action")?;
            }
            // Runtimes too leave out what this processor's kernel does not have.
            for name in names(rule)?.filter(|name| is_known(name)) {
                let mut entry = json!({"syscall": name});
                if !conditions.is_empty() {
                    entry["args"] = conditions.clone().into();
                }
                if refused {
                    let errno = json!({"errno": rule["errnoRet"]});
                    programs.push(filter(&json!("allow"), &errno, &[entry.clone()])?);
                }
                allowed.push(entry);
            }
        }
        let refusal = json!({"errno": libc::EPERM});
        programs.push(filter(&refusal, &json!("allow"), &allowed)?);
        Ok(programs)
    }
}

fn names(rule: &Value) -> Result<impl Iterator<Item = &str>> {
    let names = rule["names"].as_array().context("no names")?;
    Ok(names.iter().filter_map(Value::as_str))
}

fn ensure_is(found: &Value, wanted: &Value, key: &str) -> Result<()> {
    ensure!(found == wanted, "{key} is {found}, and not {wanted}");
    Ok(())
}

fn is_known(name: &str) -> bool {
    let rule = json!({"syscall": name});
    filter(&json!("allow"), &json!("trap"), &[rule]).is_ok()
}

fn filter(otherwise: &Value, matched: &Value, rules: &[Value]) -> Result<BpfProgram> {
    let filter = json!({"it": {
        "mismatch_action": otherwise, "match_action": matched, "filter": rules,
    }});
    let arch = std::env::consts::ARCH.try_into()?;
    let mut compiled = compile_from_json(filter.to_string().as_bytes(), arch)?;
    compiled.remove("it").context("nothing was compiled")
}

/// Returns the system calls that a unit's `SystemCallFilter=` lines allow.
fn of_unit(name: &str) -> Result<BTreeSet<String>> {
    let unit = fs::read_to_string(deploy().join("systemd").join(name))?;
    let lines = unit.lines();
    let lines = lines.filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let names = lines.flat_map(str::split_whitespace);
    Ok(names.map(str::to_owned).collect())
}

/// Units and profiles are one list; what a server may call beyond an agent is the redirect's.
#[test]
fn units_allow_what_the_profiles_allow() -> Result<()> {
    for role in ["agent", "server"] {
        let profile = Profile::of(role)?.names()?;
        assert_eq!(profile, of_unit(&format!("cpc-{role}.service"))?, "{role}");
    }
    for role in ["agent", "server"] {
        let unit = of_unit(&format!("cpc-{role}-keeper.service"))?;
        assert_eq!(
            Profile::of("keeper")?.names()?,
            unit,
            "keeper of the {role}"
        );
    }
    let [agent, server] = ["agent", "server"].map(|role| Profile::of(role)?.names());
    let (agent, server) = (agent?, server?);
    let beyond: Vec<_> = server.difference(&agent).map(String::as_str).collect();
    assert_eq!(beyond, ["bpf", "inotify_add_watch", "inotify_init1"]);
    assert!(agent.is_subset(&server));
    Ok(())
}
