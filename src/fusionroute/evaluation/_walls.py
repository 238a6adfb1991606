"""Walls around a program that a language model wrote: namespaces, Landlock, seccomp and resource limits of Linux.

Two mechanisms, each with the same system-call filter on top, on x86_64 and aarch64:

- `namespaces` (Linux 5.14): user, mount, pid, net, ipc, uts and cgroup namespaces. The root folder is a new one that
  holds the standard library and the system's shared libraries, read-only, /dev/null and a scratch tmpfs; no /proc.
  A process that was started by root becomes nobody.
- `landlock` (Linux 6.2): the folders stay where they are and Landlock allows reading the same libraries and writing the
  scratch folder. Weaker: whether a file exists, its size and its times can be seen, of any file, and threads and bytes
  written are counted by the guard, every 20 ms or so, instead of the kernel.

The filter allows what an interpreter needs of one process with threads: no fork, no exec, no socket but a socketpair,
no signal but to itself. It is an allow-list: a call it does not name does not exist.

Runs inside the guard's interpreter, so it imports the standard library only; knows nothing of programs and tests.
Numbers and structures: linux/landlock.h, linux/seccomp.h, linux/filter.h, linux/mount.h, asm/unistd.h.
"""

import ctypes
import os
import resource
import struct
import sys

# Ids inside the namespaces; outside they are the user who started it, or nobody if that is root.
PROGRAM_ID = 1000
NOBODY = 65534

# Names of system calls with their numbers on x86_64 and aarch64; - where there is none.
_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, close_range 436 436, sendfile 40 71,
copy_file_range 326 285, open 2 -, creat 85 -, openat 257 56, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -,
readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, getxattr 191 8,
lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13, mkdir 83 -, mkdirat 258 34,
rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37,
symlink 88 -, symlinkat 266 36, truncate 76 45, ftruncate 77 46, fallocate 285 47, fsync 74 82, fdatasync 75 83,
flock 73 32, fadvise64 221 223, umask 95 166, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -,
ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19, timerfd_create 283 85, timerfd_settime 286 86,
timerfd_gettime 287 87, mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, msync 26 227,
brk 12 214, membarrier 324 283, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103,
getitimer 36 102, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, time 201 -, times 100 153, futex 202 98, set_robust_list 273 99, get_robust_list 274 100,
rseq 334 293, set_tid_address 218 96, arch_prctl 158 -, restart_syscall 219 128, exit 60 93, exit_group 231 94,
wait4 61 260, waitid 247 95, getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getpgid 121 155,
getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148,
getresgid 120 150, getgroups 115 158, getpriority 140 141, getrusage 98 165, getrlimit 97 163, setrlimit 160 164,
sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120,
sched_get_priority_max 146 125, sched_get_priority_min 147 126, getcpu 309 168, uname 63 160, sysinfo 99 179,
getrandom 318 278, recvfrom 45 207, shutdown 48 210, getsockopt 55 209, getsockname 51 204, getpeername 52 205
"""
# Landlock does not rule over modes and times: there these calls claim to succeed and do nothing.
_MODES = """
chmod 90 -, fchmod 91 52, fchmodat 268 53, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88
"""
# Calls that are allowed for some values of one argument; see `_filter`.
_SOME = """
clone 56 220, fcntl 72 25, ioctl 16 29, kill 62 129, tgkill 234 131, prctl 157 167, prlimit64 302 261,
socketpair 53 199, sendto 44 206
"""
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name: str, number: int, *arguments: object) -> int:
    longs = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(name, _libc.syscall(ctypes.c_long(number), *longs))


def _prctl(option: int, value: int = 0, pointer: object = None) -> None:
    _check("prctl", _libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def die_with(parent: int) -> None:
    """Have this process killed when `parent`, which started it, ends; ends it now if that has happened."""
    if sys.platform == "linux":
        _prctl(1, 9)
    if os.getppid() != parent:
        os._exit(1)


def readable() -> list[str]:
    """Folders and files that the standard library and its shared libraries are in."""
    places = {
        *(path for path in sys.path if os.path.isdir(path)),
        os.path.dirname(os.__file__),
        os.path.join(sys.base_exec_prefix, "lib"),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/etc/ld.so.cache"),
    }
    found = sorted(place for place in places if os.path.exists(place))
    return [place for place in found if not any(place.startswith(other + "/") for other in found)]


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_namespaces(file_bytes: int) -> int:
    """Move this process into namespaces of its own, with a root folder of its own.

    Children are born into the pid namespace: the first, started here, does nothing but hold it open.

    Returns:
        A file descriptor; when the last copy of it is closed, every process in the namespace is killed.

    Raises:
        OSError: the kernel refuses; the message says what.
    """
    user, group, own = os.geteuid(), os.getegid(), os.getpid()
    unshared, tell = os.pipe()
    # Only a process that stayed outside may map an id that is not its own.
    helper = os.fork()
    if not helper:
        try:
            os.close(tell)
            os.read(unshared, 1)
            if user:
                _write(f"/proc/{own}/setgroups", "deny")
            for name, ident in ("uid", user), ("gid", group):
                lines = f"{PROGRAM_ID} {ident} 1\n" if user else f"0 0 1\n{PROGRAM_ID} {NOBODY} 1\n"
                _write(f"/proc/{own}/{name}_map", lines)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    # CLONE_NEW: NS, CGROUP, UTS, IPC, USER, PID, NET
    try:
        _check("unshare", _libc.unshare(0x00020000 | 0x02000000 | 0x0C000000 | 0x10000000 | 0x20000000 | 0x40000000))
    finally:
        os.close(tell)
        os.close(unshared)
        number = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if number:
        raise OSError(number, f"mapping the user's id: {os.strerror(number)}")
    _new_root(file_bytes)

    waiting, lifeline = os.pipe()
    if not os.fork():
        os.closerange(0, waiting)
        os.closerange(waiting + 1, 256)
        os.read(waiting, 1)
        os._exit(0)
    os.close(waiting)
    return lifeline


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(f"mounting {target}", _libc.mount(*arguments))


def _new_root(file_bytes: int) -> None:
    # Nothing of a program is ever under /proc, so what is mounted there hides no folder that has to be bound.
    new, nosuid_nodev = "/proc", 2 | 4
    _mount("none", "/", "", 0x4000 | 0x40000)  # MS_REC | MS_PRIVATE
    _mount("tmpfs", new, "tmpfs", nosuid_nodev, "size=1m,mode=755")
    # MOUNT_ATTR_: RDONLY, NOSUID, NODEV
    for source, attributes in [*((path, 1 | 2 | 4) for path in readable()), (os.devnull, 2)]:
        target = new + source
        if os.path.isdir(source):
            os.makedirs(target, 0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
            open(target, "w").close()
        _mount(source, target, "", 0x1000 | 0x4000)  # MS_BIND | MS_REC
        settings = struct.pack("4Q", attributes, 0, 0, 0)
        # mount_setattr of the whole tree: a remount would leave what is mounted below it writable.
        _syscall("mount_setattr", 442, -100, target.encode(), 0x8000, settings, len(settings))
    os.mkdir(new + "/tmp")
    ids = f"uid={PROGRAM_ID},gid={PROGRAM_ID}"
    _mount("tmpfs", new + "/tmp", "tmpfs", nosuid_nodev, f"size={file_bytes},nr_inodes=4096,mode=700,{ids}")
    os.chdir(new)
    _syscall("pivot_root", {"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b".")
    _check("umount", _libc.umount2(b".", 2))  # MNT_DETACH
    os.chdir("/")
    _mount("none", "/", "", 1 | 0x20 | 0x1000 | nosuid_nodev)  # MS_RDONLY | MS_REMOUNT | MS_BIND


def _landlock(scratch: str) -> None:
    version = _syscall("landlock_create_ruleset", 444, None, 0, 1)
    if version < 3:
        raise OSError(38, f"the kernel has version {version} of it, 3 is needed (Linux 6.2)")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    write, read, folders, truncate = 1 << 1, 1 << 2, 1 << 3, 1 << 14
    # All but executing and making devices and sockets.
    own = everything & ~(1 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15)
    ruleset = _syscall("landlock_create_ruleset", 444, struct.pack("Q", everything), 8, 0)
    rules = [
        (scratch, own),
        *((path, read | folders if os.path.isdir(path) else read) for path in readable()),
        (os.devnull, read | write | truncate),
    ]
    for path, rights in rules:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _syscall("landlock_add_rule", 445, ruleset, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    _syscall("landlock_restrict_self", 446, ruleset, 0)
    os.close(ruleset)


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = (entry.split() for entry in table.split(","))
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def _filter(*, modes: bool) -> bytes:
    """The system-call filter of this process, as classic BPF: 8 bytes an instruction."""
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(38, f"seccomp: no table of system calls for {machine}, only for {', '.join(_ARCHITECTURES)}")
    audit, column = _ARCHITECTURES[machine]
    allow, kill = 0x7FFF0000, 0x80000000
    ignored, refused, missing = (0x00050000 | number for number in (0, 1, 38))  # no error, EPERM, ENOSYS
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    code: list[tuple[int, int, int, int]] = []

    def step(kind: int, value: int, then: int = 0, otherwise: int = 0) -> None:
        code.append((kind, then, otherwise, value))

    def when(kind: int, value: int, result: int) -> None:
        step(kind, value, 0, 1)
        step(give, result)

    # struct seccomp_data: number, architecture, instruction pointer, six arguments of 8 bytes, low half first.
    step(load, 4)
    step(equal, audit, 1, 0)
    step(give, kill)
    step(load, 0)
    if machine == "x86_64":
        when(at_least, 0x40000000, kill)  # the x32 numbers
    for number in _numbers(_CALLS, column).values():
        when(equal, number, allow)
    for number in _numbers(_MODES, column).values():
        when(equal, number, allow if modes else ignored)
    some = _numbers(_SOME, column)
    own = os.getpid()
    # By call: which argument, and the values it may have.
    values: dict[str, tuple[int, list[int]]] = {
        "fcntl": (1, [0, 1, 2, 3, 4, 5, 6, 7, 1030]),  # not F_SETOWN and F_SETSIG: they send signals
        "ioctl": (1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]),  # is it a terminal, how much is there, flags
        "kill": (0, [own]),
        "tgkill": (0, [own]),
        "prctl": (0, [15, 16]),  # the name of a thread
        "prlimit64": (0, [0]),
    }
    for name, (index, allowed) in values.items():
        step(equal, some[name], 0, 2 + 2 * len(allowed))
        step(load, 16 + 8 * index)
        for value in allowed:
            when(equal, value, allow)
        step(give, refused)
    step(equal, some["clone"], 0, 4)
    step(load, 16)
    when(any_bit, 0x00010000, allow)  # CLONE_THREAD
    step(give, refused)
    # asyncio wakes itself through a pair of connected stream sockets.
    step(equal, some["socketpair"], 0, 7)
    step(load, 16)
    step(equal, 1, 0, 4)  # AF_UNIX
    step(load, 24)
    step(0x54, 0xF)  # without SOCK_CLOEXEC and SOCK_NONBLOCK
    when(equal, 1, allow)  # SOCK_STREAM
    step(give, refused)
    step(equal, some["sendto"], 0, 6)
    step(load, 48)  # to the other end: no address
    step(equal, 0, 0, 3)
    step(load, 52)
    when(equal, 0, allow)
    step(give, refused)
    # A newer libc tries newer calls first and falls back if they are missing, not if they are refused.
    when(at_least, 424, missing)
    step(give, refused)
    return b"".join(struct.pack("HBBI", *entry) for entry in code)


def _limit(kind: int, value: int, most: int | None = None) -> None:
    ceiling = resource.getrlimit(kind)[1]
    soft, hard = value, value if most is None else most
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def confine(mechanism: str | None, *, cpu: int, memory: int, threads: int, file_bytes: int, scratch: str) -> None:
    """Close the walls around this process, for good; with `namespaces`, `enter_namespaces` came before.

    Args:
        mechanism: `namespaces`, `landlock`, or `None` for resource limits alone.
        cpu: seconds of processor time.
        memory: bytes of address space.
        threads: how many, with the first; without namespaces this is the guard's to see to.
        file_bytes: bytes of the largest file.
        scratch: the one folder to write in; the current one afterwards.

    Raises:
        OSError: the kernel refuses; the message says what.
    """
    os.chdir(scratch)
    if mechanism == "namespaces":
        if os.geteuid() == 0:
            os.setgroups([])
        os.setresgid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
        os.setresuid(PROGRAM_ID, PROGRAM_ID, PROGRAM_ID)
        # Processes of this id are counted by namespace; three of them are the guard's.
        _limit(resource.RLIMIT_NPROC, threads + 2)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    _limit(resource.RLIMIT_CPU, cpu, cpu + 1)  # at the soft limit SIGXCPU, which says why
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, memory)
    if mechanism is None:
        return
    capabilities = struct.pack("2I", 0x20080522, 0)
    _check("capset", _libc.capset(capabilities, bytes(24)))
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    if mechanism == "landlock":
        _landlock(scratch)
    code = _filter(modes=mechanism == "namespaces")
    instructions = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(instructions))
    _prctl(22, 2, program)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
