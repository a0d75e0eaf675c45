//! Links of programs to a cgroup, by bpf(2) itself.
//!
//! aya 0.14 can't replace the program of a cgroup link, nor tell the cgroup of a link; restarts need
//! both.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::Path,
    ptr,
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::Hook;

/// `enum bpf_cmd` of linux/bpf.h.
#[derive(Clone, Copy)]
enum Command {
    ObjPin = 6,
    ObjGet = 7,
    ObjGetInfoByFd = 15,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkGetFdById = 30,
    LinkGetNextId = 31,
    LinkDetach = 34,
}

/// A cgroup to attach to.
#[derive(Debug)]
pub(super) struct Cgroup {
    directory: File,
    id: u64,
}

impl Cgroup {
    /// Opens the directory of a cgroup, version 2.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let directory = File::open(path)?;
        if fstatfs(&directory)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::other("not on a cgroup2 file system"));
        }
        // The kernel's number of a cgroup is its directory's inode number.
        let id = directory.metadata()?.ino();
        Ok(Self { directory, id })
    }

    /// Returns the kernel's number of the cgroup, which changes when the cgroup is removed and
    /// created again.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

/// Access to a pinned object. The pin's owner and mode decide, no capability (from Linux 5.19 on).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Read access.
    Read,
    /// Read and write access; the only one for links and programs.
    Write,
}

/// Opens a pinned object.
pub(super) fn open_pin(path: &Path, access: Access) -> io::Result<OwnedFd> {
    /// `BPF_F_RDONLY` of linux/bpf.h.
    const READ_ONLY: u32 = 1 << 3;
    let pathname = c_path(path)?;
    let attr = ObjectAttr {
        pathname: pathname.as_ptr() as u64,
        fd: 0,
        flags: match access {
            Access::Read => READ_ONLY,
            Access::Write => 0,
        },
    };
    bpf_fd(Command::ObjGet, &attr)
}

/// The kernel's information about a link.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkInfo {
    /// Number of the program.
    pub(super) program: u32,
    /// Number of the cgroup, 0 after its removal.
    pub(super) cgroup: u64,
}

/// A program in its cgroup. It is detached when the last descriptor is closed and no pin is left.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Opens a pinned link; `None` when nothing is pinned there.
    pub(super) fn open(path: &Path) -> io::Result<Option<Self>> {
        match open_pin(path, Access::Write) {
            Ok(fd) => Ok(Some(Self(fd))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns every link to a cgroup in the kernel, pinned or not, of any process. Takes
    /// CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// The error of the system call without the capability. A link that goes meanwhile is left out.
    pub(super) fn all() -> io::Result<Vec<Self>> {
        let mut links = Vec::new();
        let mut last = 0;
        loop {
            let mut attr = IdAttr {
                id: last,
                next: 0,
                flags: 0,
            };
            match bpf_mut(Command::LinkGetNextId, &mut attr) {
                Ok(_) => last = attr.next,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(links),
                Err(error) => return Err(error),
            }
            let attr = IdAttr {
                id: last,
                next: 0,
                flags: 0,
            };
            match bpf_fd(Command::LinkGetFdById, &attr).map(Self) {
                Ok(link) if link.raw_info().is_ok_and(|info| info.kind == CGROUP_LINK) => {
                    links.push(link);
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(error);
                }
                _ => {}
            }
        }
    }

    /// Detaches the program from its cgroup at once, despite other holders of the link
    /// (`BPF_LINK_DETACH`, Linux 5.9).
    pub(super) fn detach(&self) -> io::Result<()> {
        let attr = LinkAttr {
            link: self.0.as_raw_fd(),
        };
        bpf(Command::LinkDetach, &attr).map(drop)
    }

    /// Attaches a program to a cgroup (`BPF_LINK_CREATE`, Linux 5.7). Other programs there stay.
    pub(super) fn create(program: BorrowedFd<'_>, cgroup: &Cgroup, hook: Hook) -> io::Result<Self> {
        let attr = LinkCreateAttr {
            program: program.as_raw_fd(),
            target: cgroup.directory.as_raw_fd(),
            attach_type: hook.attach_type(),
            flags: 0,
        };
        bpf_fd(Command::LinkCreate, &attr).map(Self)
    }

    /// Replaces the program of the link, in one step (`BPF_LINK_UPDATE`).
    pub(super) fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let attr = LinkUpdateAttr {
            link: self.0.as_raw_fd(),
            program: program.as_raw_fd(),
            flags: 0,
            old_program: 0,
        };
        bpf(Command::LinkUpdate, &attr).map(drop)
    }

    /// Pins the link, and replaces an existing pin in one step.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        // bpffs renames over files, but does not pin over them.
        let fresh = path.with_file_name(match path.file_name().and_then(|name| name.to_str()) {
            Some(name) => format!("{name}-new"),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        });
        remove_pin(&fresh)?;
        let pathname = c_path(&fresh)?;
        let fd = self.0.as_raw_fd();
        let attr = ObjectAttr {
            pathname: pathname.as_ptr() as u64,
            fd,
            flags: 0,
        };
        bpf(Command::ObjPin, &attr)?;
        std::fs::rename(fresh, path)
    }

    /// Returns the kernel's information about the link.
    pub(super) fn info(&self) -> io::Result<LinkInfo> {
        let info = self.raw_info()?;
        Ok(LinkInfo {
            program: info.program,
            cgroup: info.cgroup,
        })
    }

    fn raw_info(&self) -> io::Result<CgroupLinkInfo> {
        let mut info = CgroupLinkInfo::default();
        let attr = InfoAttr {
            fd: self.0.as_raw_fd(),
            length: size_of::<CgroupLinkInfo>() as u32,
            info: &raw mut info as u64,
        };
        bpf(Command::ObjGetInfoByFd, &attr)?;
        Ok(info)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Removes a pin; a missing one is no error.
pub(super) fn remove_pin(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Arguments of one command: a prefix of `union bpf_attr`, whose rest counts as zero.
///
/// # Safety
///
/// `#[repr(C)]`, laid out as the kernel lays out the commands it is used for, without padding,
/// and every address in it is valid for what the command does with it.
unsafe trait Attr {}

#[repr(C)]
struct ObjectAttr {
    pathname: u64,
    fd: RawFd,
    flags: u32,
}
// SAFETY: `pathname` is a C string that its owner keeps for the call.
unsafe impl Attr for ObjectAttr {}

#[repr(C)]
struct LinkCreateAttr {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}
// SAFETY: no addresses.
unsafe impl Attr for LinkCreateAttr {}

#[repr(C)]
struct LinkUpdateAttr {
    link: RawFd,
    program: RawFd,
    flags: u32,
    old_program: u32,
}
// SAFETY: no addresses.
unsafe impl Attr for LinkUpdateAttr {}

#[repr(C)]
struct IdAttr {
    id: u32,
    next: u32,
    flags: u32,
}
// SAFETY: no addresses.
unsafe impl Attr for IdAttr {}

#[repr(C)]
struct LinkAttr {
    link: RawFd,
}
// SAFETY: no addresses.
unsafe impl Attr for LinkAttr {}

#[repr(C)]
struct InfoAttr {
    fd: RawFd,
    length: u32,
    info: u64,
}
// SAFETY: `info` is a `CgroupLinkInfo` of `length` bytes that lives through the call.
unsafe impl Attr for InfoAttr {}

/// `BPF_LINK_TYPE_CGROUP`.
const CGROUP_LINK: u32 = 3;

/// `struct bpf_link_info` of a cgroup link.
#[repr(C)]
#[derive(Default)]
struct CgroupLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _reserved: u32,
    cgroup: u64,
    attach_type: u32,
    _padding: u32,
}

fn bpf_fd<A: Attr>(command: Command, attr: &A) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the command returned a new descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<A: Attr>(command: Command, attr: &A) -> io::Result<libc::c_long> {
    // SAFETY: `Attr` promises that the kernel understands the bytes and may follow its addresses; the
    // commands that come here write none of them.
    unsafe { call(command, ptr::from_ref(attr).cast_mut()) }
}

/// Calls bpf(2) as [`bpf`] does, for commands that answer in their arguments.
fn bpf_mut<A: Attr>(command: Command, attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: as above, and what is written is ours.
    unsafe { call(command, ptr::from_mut(attr)) }
}

/// # Safety
///
/// `attr` is valid for reads, and for writes where the command writes.
unsafe fn call<A: Attr>(command: Command, attr: *mut A) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, attr, size_of::<A>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
