//! Debian's archive, with a separate apt: packages of other releases, without any effect on the
//! packages of this machine.
//!
//! The machine's own sources say where the archive is; only the suite's name differs.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::Release;
use crate::sh;

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suites that have kernels, and the release whose root file system runs with each by default.
const SUITES: [(&str, Repository, Release); 4] = [
    ("bullseye-security", Repository::Security, Release::Bookworm),
    ("bookworm", Repository::Main, Release::Bookworm),
    ("trixie", Repository::Main, Release::Trixie),
    ("trixie-backports", Repository::Main, Release::Trixie),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Repository {
    Main,
    Security,
}

/// An apt with a state and sources of its own.
pub(super) struct Archive {
    config: PathBuf,
    main: String,
}

/// Series of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Series {
    /// The newest that there is.
    Newest,
    /// The newest of this one.
    Of(u32, u32),
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "newest" {
            return Ok(Self::Newest);
        }
        let (major, minor) = text.split_once('.').unwrap_or_default();
        match (major.parse(), minor.parse()) {
            (Ok(major), Ok(minor)) => Ok(Self::Of(major, minor)),
            _ => Err("it is a series such as 6.1, or `newest`".to_owned()),
        }
    }
}

/// A kernel that the archive has.
pub(super) struct Kernel {
    /// `6.1.0-50-cloud-amd64`
    pub(super) version: String,
    /// Release of the root file system to run with.
    pub(super) release: Release,
}

/// An unpacked kernel.
pub(super) struct Unpacked {
    /// `6.1.0-50-cloud-amd64`
    pub(super) version: String,
    /// The compressed kernel.
    pub(super) image: PathBuf,
    /// Folder that contains lib/modules.
    pub(super) base: PathBuf,
}

impl Archive {
    /// Fetches the lists of packages into `folder`.
    pub(super) fn update(folder: &Path) -> Result<Self> {
        sh::heading("Debian's archive");
        if !Path::new(KEYS).exists() {
            bail!(
                "there is no {KEYS}: on Debian install the package debian-archive-keyring; on \
                 another distribution this needs a Debian container"
            );
        }
        let (main, security) = repositories()?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let list = folder.join("sources.list");
        let mut sources = String::new();
        for (suite, repository, _) in SUITES {
            let repository = match repository {
                Repository::Main => Some(&main),
                Repository::Security => security.as_ref(),
            };
            if let Some(repository) = repository {
                writeln!(sources, "{}", source(repository, suite))?;
            }
        }
        fs::write(&list, sources)?;
        // dpkg's status: nothing is installed.
        fs::write(folder.join("status"), "")?;
        let config = folder.join("apt.conf");
        let here = folder.display();
        fs::write(
            &config,
            format!(
                "Dir::State \"{here}\";\nDir::State::status \"{here}/status\";\n\
                 Dir::Cache \"{here}/cache\";\nDir::Etc::SourceList \"{here}/sources.list\";\n\
                 Dir::Etc::SourceParts \"-\";\nAcquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 APT::Sandbox::User \"root\";\nAPT::Architecture \"amd64\";\n\
                 APT::Architectures \"amd64\";\n"
            ),
        )?;
        let archive = Self { config, main };
        // A suite that is gone is an error of apt's, and leaves the others usable.
        if let Err(error) = sh::run(archive.apt("apt-get").args(["-qq", "update"])) {
            eprintln!("    {error:#}; continuing with the present lists");
        }
        Ok(archive)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config);
        command
    }

    /// Returns the newest kernel of a series; the cloud flavour, which has the drivers of a virtual
    /// machine.
    pub(super) fn kernel(&self, series: Series) -> Result<Kernel> {
        let mut search = self.apt("apt-cache");
        search.args([
            "search",
            "--names-only",
            "^linux-image-[0-9].*-cloud-amd64$",
        ]);
        let found = sh::output(&mut search)?;
        let versions = found.lines().filter_map(|line| {
            let name = line.split_whitespace().next()?;
            name.strip_prefix("linux-image-")
        });
        let Some(version) = newest(series, versions) else {
            bail!("no suite has such a kernel; the suites have\n{found}");
        };
        let mut policy = self.apt("apt-cache");
        policy.arg("madison").arg(format!("linux-image-{version}"));
        let policy = sh::output(&mut policy)?;
        let suite = SUITES
            .iter()
            .find(|(suite, ..)| policy.contains(&format!(" {suite}/")));
        let (_, _, release) = suite.with_context(|| format!("no suite has it: {policy}"))?;
        Ok(Kernel {
            version: version.to_owned(),
            release: *release,
        })
    }

    /// Unpacks a kernel below `folder`, without installing it.
    pub(super) fn unpack(&self, kernel: &Kernel, folder: &Path) -> Result<Unpacked> {
        let version = &kernel.version;
        let to = folder.join(version);
        let done = to.join("complete");
        if !done.exists() {
            // Newer kernels come in several packages.
            for part in ["image", "base", "binary", "modules"] {
                let name = format!("linux-{part}-{version}");
                if part == "image" || self.has(&name) {
                    self.extract(&name, &to)?;
                }
            }
        }
        let images = [
            to.join(format!("boot/vmlinuz-{version}")),
            // Where newer packages have it.
            to.join(format!("usr/lib/modules/{version}/vmlinuz")),
        ];
        let image = { images.into_iter().find(|image| image.exists()) }
            .with_context(|| format!("the packages of Linux {version} have no vmlinuz"))?;
        let base = if to.join("usr/lib/modules").exists() {
            to.join("usr")
        } else {
            to
        };
        if !done.exists() {
            sh::run(Command::new("depmod").arg("-b").arg(&base).arg(version))?;
            fs::write(done, "")?;
        }
        Ok(Unpacked {
            version: version.clone(),
            image,
            base,
        })
    }

    fn has(&self, package: &str) -> bool {
        sh::succeeds(self.apt("apt-cache").args(["show", package]))
    }

    /// Fetches a package and unpacks it into `folder`.
    pub(super) fn extract(&self, package: &str, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let fetched = tempfile::tempdir_in(folder)?;
        let mut download = self.apt("apt-get");
        download.args(["-qq", "download", package]);
        sh::run(download.current_dir(fetched.path()))?;
        for file in fs::read_dir(fetched.path())? {
            sh::run(Command::new("dpkg").arg("-x").arg(file?.path()).arg(folder))?;
        }
        Ok(())
    }

    /// Creates a tree of a release's packages at `to`.
    pub(super) fn tree(
        &self,
        variant: &str,
        release: Release,
        packages: &[&str],
        to: &Path,
    ) -> Result<()> {
        let list = to.with_extension("list");
        fs::create_dir_all(to.parent().context("no folder")?)?;
        fs::write(&list, format!("{}\n", source(&self.main, release.name())))?;
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap.arg(format!("--variant={variant}"));
        mmdebstrap.arg(format!("--include={}", packages.join(",")));
        mmdebstrap.arg("--aptopt=APT::Install-Recommends \"false\"");
        mmdebstrap
            .args(["--quiet", release.name()])
            .arg(to)
            .arg(&list);
        sh::run(&mut mmdebstrap)
    }
}

fn source(repository: &str, suite: &str) -> String {
    format!("deb [signed-by={KEYS}] {repository} {suite} main")
}

/// Returns the repository of this machine's own release, and that of its security updates.
fn repositories() -> Result<(String, Option<String>)> {
    let os = fs::read_to_string("/etc/os-release").context("which system is this")?;
    let mut lines = os.lines();
    let codename = lines.find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("/etc/os-release has no VERSION_CODENAME")?;
    let mut targets = Command::new("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "$(RELEASE) $(COMPONENT) $(REPO_URI)",
    ]);
    let targets = sh::output(targets.arg("Created-By: Packages"))?;
    let of = |suite: String| {
        let head = format!("{suite} main ");
        let mut lines = targets.lines();
        lines.find_map(|line| line.strip_prefix(&head).map(str::to_owned))
    };
    let main = of(codename.to_owned())
        .or_else(|| of("stable".to_owned()))
        .with_context(|| format!("apt has no source of {codename}, main"))?;
    let security = of(format!("{codename}-security")).or_else(|| of("stable-security".to_owned()));
    Ok((main, security))
}

/// Returns the newest of `versions` in a series.
fn newest<'a>(series: Series, versions: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut known: Vec<_> = versions
        .map(|version| (numbers(version), version))
        // Packages that only name the newest one have the series alone.
        .filter(|(numbers, _)| numbers.len() > 2)
        .filter(|(numbers, _)| match series {
            Series::Newest => true,
            Series::Of(major, minor) => numbers.starts_with(&[major, minor]),
        })
        .collect();
    known.sort();
    known.pop().map(|(_, version)| version)
}

/// Returns the numbers of `6.12.117+deb13-cloud-amd64` before its flavour.
fn numbers(version: &str) -> Vec<u32> {
    let version = version.split("-cloud").next().unwrap_or_default();
    let parts = version.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series() {
        let all = [
            "6.1-cloud-amd64",
            "6.1.0-9-cloud-amd64",
            "6.1.0-50-cloud-amd64",
            "6.12.95+deb12-cloud-amd64",
            "6.12.117+deb13-cloud-amd64",
            "7.3.4+deb13-cloud-amd64",
        ];
        let newest = |text: &str| newest(text.parse().unwrap(), all.into_iter());
        assert_eq!(newest("6.1"), Some("6.1.0-50-cloud-amd64"));
        assert_eq!(newest("6.12"), Some("6.12.117+deb13-cloud-amd64"));
        assert_eq!(newest("newest"), Some("7.3.4+deb13-cloud-amd64"));
        assert_eq!(newest("5.15"), None);
    }

    #[test]
    fn a_series_is_two_numbers() {
        for text in ["", "6", "6.", "6.x", "6.1.0", "new"] {
            assert!(text.parse::<Series>().is_err(), "{text}");
        }
    }
}
