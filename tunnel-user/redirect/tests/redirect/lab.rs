//! A host for one test: namespaces, a cgroup, a BPF file system, and a network of which a part is
//! captured.
//!
//! The namespaces have a loopback interface and nothing else. Captured networks are routed to it,
//! so that a connection that escapes reaches a decoy instead of failing for another reason.
//! Dropping the laboratory removes everything.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use cpc_host::kernel;
use cpc_redirect::{AttachmentSpec, FailMode, Rule, within};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{Signal, kill},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, Uid, fork},
};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

/// Port of the decoys; captured.
pub(crate) const PORT: u16 = 10250;
/// Addresses that are captured.
pub(crate) const V4: &str = "10.99.1.2";
pub(crate) const V6: &str = "fd99::2";
/// Addresses that are not.
pub(crate) const OTHER_V4: &str = "10.98.1.2";

/// Number of the tenant.
pub(crate) const TENANT: u32 = 7;

/// Returns the laboratory; `None` where the host can't have one, which fails in CI.
pub(crate) fn lab() -> Option<Lab> {
    let missing = if !Uid::effective().is_root() {
        "needs root"
    } else if cpc_redirect::object().is_none() {
        "needs the kernel programs: cargo xtask build-ebpf"
    } else {
        return Some(Lab::new().expect("laboratory"));
    };
    skip(missing);
    None
}

/// Prints why a test can't run, which fails in CI.
pub(crate) fn skip(missing: &str) {
    assert!(
        std::env::var_os("CI").is_none(),
        "can't run in CI: {missing}"
    );
    eprintln!("skipped: {missing}");
}

/// Returns the laboratory of a test that expects errnos of connect(2). The kernel lets a program
/// choose them since Linux 6.1.
pub(crate) fn lab_with_errno() -> Option<Lab> {
    if !kernel::is_since((6, 1)) {
        skip(&format!(
            "needs Linux 6.1 for errnos of connect(2), this is {}",
            kernel::release()
        ));
        return None;
    }
    lab()
}

pub(crate) struct Lab {
    pub(crate) netns: Netns,
    pub(crate) cgroup: Cgroup,
    pin: Mount,
}

impl Lab {
    fn new() -> io::Result<Self> {
        Ok(Self {
            netns: Netns::new()?,
            cgroup: Cgroup::new()?,
            pin: Mount::new("bpf")?,
        })
    }

    pub(crate) fn pin(&self) -> PathBuf {
        self.pin.path().join("cpc")
    }

    /// An attachment of the laboratory's namespace and cgroup to a connector's listeners.
    pub(crate) fn spec(&self, listen4: SocketAddr, listen6: SocketAddr) -> AttachmentSpec {
        let (SocketAddr::V4(listen4), SocketAddr::V6(listen6)) = (listen4, listen6) else {
            panic!("one listener of each family");
        };
        AttachmentSpec {
            name: "test".to_owned(),
            tenant: TENANT,
            cgroup: self.cgroup.path().to_owned(),
            netns: Some(self.netns.path()),
            listen4: Some(listen4),
            listen6: Some(listen6),
            capture: vec![rule("10.99.0.0/16"), rule("fd99::/64")],
            exclude: Vec::new(),
            fail: FailMode::Closed,
        }
    }
}

pub(crate) fn rule(cidr: &str) -> Rule {
    Rule {
        cidr: cidr.parse().unwrap(),
        ports: Vec::new(),
    }
}

/// A network namespace that lasts as long as this handle.
pub(crate) struct Netns(File);

impl Netns {
    pub(crate) fn new() -> io::Result<Self> {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let netns = made.join().unwrap().map(Self)?;
        netns.ip("link set lo up");
        netns.ip("-4 route add local 10.98.0.0/15 dev lo");
        netns.ip("-6 route add local fd98::/15 dev lo");
        Ok(netns)
    }

    /// Runs ip(8) inside.
    pub(crate) fn ip(&self, arguments: &str) {
        let mut ip = Command::new("ip");
        ip.args(arguments.split(' '));
        let status = self.within(|| ip.status());
        assert!(status.success(), "ip {arguments}: {status}");
    }

    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    /// Runs `work` in the namespace.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        within(Some(&self.path()), work).unwrap()
    }

    /// Listens at the destination of connections that escape the redirect, and answers "decoy".
    pub(crate) fn decoy(&self, port: u16) {
        let listener = self.within(|| TcpListener::bind((IpAddr::from([0_u16; 8]), port)));
        thread::spawn(move || {
            for stream in listener.incoming() {
                // The client may be gone already.
                let _ = stream.and_then(|mut stream| stream.write_all(b"decoy"));
            }
        });
    }
}

/// A cgroup of version 2.
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Mount of the hierarchy, where the host had none.
    _mount: Option<Mount>,
}

impl Cgroup {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mounted = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            fields
                .next()
                .filter(|_| fields.next() == Some("cgroup2"))
                .map(PathBuf::from)
        });
        let (root, mount) = match mounted {
            Some(root) => (root, None),
            None => {
                let mount = Mount::new("cgroup2")?;
                (mount.path().to_owned(), Some(mount))
            }
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("cpc-test-{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self {
            path,
            _mount: mount,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove_tree(&self.path);
    }
}

/// Removes a cgroup and the cgroups that a test has left in it.
fn remove_tree(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    remove_cgroup(path);
}

/// Removes a cgroup whose last process may still be exiting.
pub(crate) fn remove_cgroup(path: &Path) {
    for _ in 0..200 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return eprintln!("{}: {error}", path.display()),
            Ok(()) => return,
        }
    }
    eprintln!("{}: still in use", path.display());
}

/// A file system mounted on a temporary directory.
struct Mount(TempDir);

impl Mount {
    fn new(kind: &str) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        mount(
            Some(kind),
            directory.path(),
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )?;
        Ok(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.path(), MntFlags::MNT_DETACH) {
            eprintln!("{}: {error}", self.path().display());
        }
    }
}

/// Lock held while a new process still has copies of our descriptors.
static FORKING: Mutex<()> = Mutex::new(());

/// Waits until every process has closed its copies of closed descriptors.
pub(crate) fn settle() {
    drop(FORKING.lock().unwrap_or_else(PoisonError::into_inner));
}

/// A process in a cgroup and a namespace that creates sockets for the test: the place of its
/// creation decides about a socket, and not its user.
pub(crate) struct Factory {
    channel: UnixStream,
    child: Pid,
}

impl Factory {
    pub(crate) fn new(cgroup: &Path, netns: &Netns) -> Self {
        let procs = fs::OpenOptions::new()
            .write(true)
            .open(cgroup.join("cgroup.procs"))
            .unwrap();
        let (channel, theirs) = UnixStream::pair().unwrap();
        let _forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the child calls nothing that another thread's lock could hold up: system calls
        // and glibc's malloc, which is safe after fork.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                drop(theirs);
                let factory = Self { channel, child };
                (&factory.channel)
                    .read_exact(&mut [0])
                    .expect("the factory is ready");
                factory
            }
            ForkResult::Child => {
                let served = join(procs, netns).and_then(|()| serve(theirs));
                // SAFETY: ends the child without running the parent's handlers.
                unsafe { libc::_exit(i32::from(served.is_err())) }
            }
        }
    }

    pub(crate) fn socket(&self, domain: Domain, kind: Type, protocol: i32) -> io::Result<Socket> {
        let request = [i32::from(domain), i32::from(kind), protocol];
        (&self.channel).write_all(&request.map(i32::to_ne_bytes).concat())?;
        let mut errno = [0; 4];
        let mut data = [io::IoSliceMut::new(&mut errno)];
        let mut control = nix::cmsg_space!(i32);
        let fd = self.channel.as_raw_fd();
        let message = recvmsg::<()>(
            fd,
            &mut data,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: just received, and without another owner.
                return Ok(unsafe { OwnedFd::from_raw_fd(fds[0]) }.into());
            }
        }
        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
    }

    /// Moves the process without the sockets that it has created.
    pub(crate) fn move_to(&self, cgroup: &Path) {
        fs::write(cgroup.join("cgroup.procs"), self.child.to_string()).unwrap();
    }

    pub(crate) fn tcp(&self, domain: Domain) -> Socket {
        self.socket(domain, Type::STREAM, 0).unwrap()
    }
}

impl Drop for Factory {
    fn drop(&mut self) {
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
    }
}

fn join(mut procs: File, netns: &Netns) -> io::Result<()> {
    procs.write_all(b"0")?;
    Ok(setns(&netns.0, CloneFlags::CLONE_NEWNET)?)
}

fn serve(channel: UnixStream) -> io::Result<()> {
    // SAFETY: nothing in this process uses another descriptor any more.
    let mut channel = unsafe {
        libc::dup2(channel.as_raw_fd(), 3);
        libc::close_range(4, u32::MAX, 0);
        UnixStream::from(OwnedFd::from_raw_fd(3))
    };
    channel.write_all(b"!")?;
    loop {
        let mut request = [0; 12];
        channel.read_exact(&mut request)?;
        let (words, _) = request.as_chunks::<4>();
        let [domain, kind, protocol] = [0, 1, 2].map(|index| i32::from_ne_bytes(words[index]));
        // SAFETY: has no preconditions.
        let fd = unsafe { libc::socket(domain, kind, protocol) };
        let errno = if fd < 0 { Errno::last_raw() } else { 0 }.to_ne_bytes();
        let data = [io::IoSlice::new(&errno)];
        let fds = [fd];
        let control: &[_] = if fd < 0 {
            &[]
        } else {
            &[ControlMessage::ScmRights(&fds)]
        };
        sendmsg::<()>(channel.as_raw_fd(), &data, control, MsgFlags::empty(), None)?;
        // SAFETY: the descriptor is ours and not used any more.
        unsafe { libc::close(fd) };
    }
}
