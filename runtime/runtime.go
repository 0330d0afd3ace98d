// SPDX-License-Identifier: Apache-2.0

// Package runtime says what the node needs of a container runtime: a Spec goes
// in, a Task comes out, an Exit says how it ended.
//
// The package is pure: it touches no machine and imports nothing of ours.
// runtime/containerd is the real thing, runtime/runtimetest a working
// miniature, and runtimetest.Run the suite that both pass. runtime/logs writes
// and reads the log files of a task.
//
// A task lives outside the process that made it. Whoever restarts asks Find
// for it again and goes on; Wait then answers the true exit, also of a command
// that ended meanwhile.
package runtime

import (
	"context"
	"errors"
	"io"
	"syscall"
	"time"
)

// Questions that callers ask of an error with errors.Is.
var (
	// ErrNotFound: the task is certainly not there. A runtime that is slow or
	// away answers another error, never this one.
	ErrNotFound = errors.New("not found")
	// ErrImageNotFound: no image of that name is in the store, or the registry
	// says that it has none.
	ErrImageNotFound = errors.New("image not found")
	// ErrExists: something already has that id.
	ErrExists = errors.New("already exists")
	// ErrInvalidArchive: what was to be imported is not a whole OCI or Docker
	// image archive. Nothing of it was kept.
	ErrInvalidArchive = errors.New("invalid image archive")
	// ErrInvalidSpec: the Spec cannot be run as it is written. Nothing was made.
	ErrInvalidSpec = errors.New("invalid spec")
	// ErrCommand: the command cannot be run: not found in the image, not
	// executable, or its working directory cannot be entered.
	ErrCommand = errors.New("command cannot be run")
	// ErrNotRunning: the command has not started yet or is over.
	ErrNotRunning = errors.New("not running")
	// ErrNoTerminal: what has no terminal has no size.
	ErrNoTerminal = errors.New("no terminal")
	// ErrNoAttach: the task was made without Terminal and without Stdin, so its
	// output goes to its logger alone.
	ErrNoAttach = errors.New("task has neither a terminal nor stdin")
	// ErrSlowReader: an attached reader took nothing for so long that it was cut
	// off in favour of the command.
	ErrSlowReader = errors.New("attached reader too slow")
)

// Limits of one Spec. They keep a record of it small; they are not the
// kernel's.
const (
	MaxEnv       = 1024
	MaxArgs      = 1024
	MaxSpecBytes = 128 << 10 // of arguments and environment together
)

// Spec is one sandbox's task. Zero limits mean no limit.
type Spec struct {
	ID    string // required; container id, also names the snapshot
	Image string // required; as given to Image, Import or Pull

	Command  []string // empty: entrypoint and command of the image
	Env      []string // KEY=value, over the image's own
	Workdir  string   // absolute; empty: the image's, else /
	User     string   // user[:group], names or numbers; empty: the image's, else root
	Hostname string   // empty: ID

	CgroupPath string // required; relative to the cgroup root
	NetnsPath  string // empty: a new, unconnected network namespace

	CPUMillis   int64 // 1000 is one CPU
	MemoryBytes int64 // no swap beyond it
	PIDs        int64

	Terminal bool // one stream with a pty
	Stdin    bool // stdin stays open until an attached reader of it ends

	LogDir      string // required; made if missing
	LogMaxBytes int64  // of one file; 0: DefaultLogMaxBytes
	LogFiles    int    // kept beside current.log included; 0: DefaultLogFiles

	Labels map[string]string // stored with the container, not seen inside

	ResolvConf, Hosts string // files bound read-only over /etc/resolv.conf and /etc/hosts; "" none

	// Partial: the operator runs a node that lacks a cgroup controller and
	// knows it. A limit whose controller is missing is then left out; without
	// Partial, Create refuses.
	Partial bool
}

// Defaults of a Spec.
const (
	DefaultLogMaxBytes = 10 << 20
	DefaultLogFiles    = 5
)

// Exit is how a command ended.
type Exit struct {
	Code uint32 // of the command; 128+n if signal n killed it
	Time time.Time
	// OOMKilled: the runtime reported that the kernel killed something in the
	// task for want of memory. False may mean that nobody was there to hear it;
	// the cgroup's own counter is the better witness.
	OOMKilled bool
}

// State of a task.
type State string

// States of a task.
const (
	StateCreated State = "created" // made, the command not started
	StateRunning State = "running"
	StatePaused  State = "paused"
	StateStopped State = "stopped" // the command ended; Status.Exit says how
)

// Status is a task at one moment.
type Status struct {
	State State
	PID   uint32 // in the host's pid namespace; 0 when stopped
	Exit  Exit   // only when stopped
}

// IO is one end of a conversation with a process. A nil Stdin is an empty one;
// a nil writer drops what it would get. With a terminal all output goes to
// Stdout.
type IO struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
}

// ExecSpec is one more process in a running task. It inherits the task's user,
// environment, working directory, capabilities and seccomp filter.
type ExecSpec struct {
	Command    []string // required
	Env        []string // over the task's own
	Workdir    string   // empty: the task's
	User       string   // empty: the task's
	Terminal   bool
	Rows, Cols uint32 // first size of the terminal, if not zero
}

// Process is an exec'd process. It and what is left of it in the runtime are
// cleared away once it is over, whether or not anyone waits.
type Process interface {
	ID() string
	PID() uint32
	// Wait blocks until the process is over and all its output is delivered.
	Wait(ctx context.Context) (Exit, error)
	// Kill signals the process; ErrNotRunning if it is over.
	Kill(ctx context.Context, sig syscall.Signal) error
	// Resize sets the size of its terminal.
	Resize(ctx context.Context, rows, cols uint32) error
}

// Task is the command of one sandbox and the namespaces that hold it.
type Task interface {
	ID() string
	// PID of the first process in the host's pid namespace.
	PID() uint32
	// Start lets the command run. Until then the runtime's own init holds the
	// namespaces and cgroup, so that network and policy can be attached.
	Start(ctx context.Context) error
	// Wait blocks until the command is over. It works on adopted tasks too, on
	// such as ended while nobody looked, and on one that Remove has removed.
	// ErrNotFound if it went otherwise and nobody knows how.
	Wait(ctx context.Context) (Exit, error)
	// Kill signals the command, or every process of the task with all.
	// ErrNotRunning if it is over.
	Kill(ctx context.Context, sig syscall.Signal, all bool) error
	// Exec starts another process in the task. The context bounds the start
	// only.
	Exec(ctx context.Context, spec ExecSpec, stdio IO) (Process, error)
	// Resize sets the size of the task's terminal.
	Resize(ctx context.Context, rows, cols uint32) error
	// Attach relays until the command is over and its output delivered (nil),
	// or the context ends (its error), or this reader is cut off
	// (ErrSlowReader). Several may attach; all see the output from now on.
	// When Stdin ends, so does the command's, for good.
	Attach(ctx context.Context, stdio IO) error
	// Status asks the runtime.
	Status(ctx context.Context) (Status, error)
}

// Image is one image in the local store.
type Image struct {
	Name      string // as stored
	Digest    string // of the index or manifest, sha256:...
	SizeBytes int64  // of the content for this platform, compressed as stored
	Created   time.Time
}

// Runtime is everything that runtime/containerd and the fake of
// runtime/runtimetest do. Consumers name the few methods they use.
type Runtime interface {
	// Create makes snapshot, container and task; the command is not started.
	// On an error nothing of it is left; ErrImageNotFound, ErrInvalidSpec,
	// ErrCommand and ErrExists say why. Of ErrExists everything is left as it
	// was.
	Create(ctx context.Context, s Spec) (Task, error)
	// Find adopts a task. ErrNotFound if there is certainly none: whatever else
	// may be left of the id, Remove clears.
	Find(ctx context.Context, id string) (Task, error)
	// Remove kills and deletes the task, then container and snapshot, and
	// whatever an interrupted Create or Remove left. Nil if nothing was there.
	// Log files stay.
	Remove(ctx context.Context, id string) error
	// List answers the ids of which anything is left: task, container or
	// snapshot; sorted.
	List(ctx context.Context) ([]string, error)

	Image(ctx context.Context, ref string) (Image, error)
	Images(ctx context.Context) ([]Image, error) // sorted by name
	// Import reads an OCI or Docker archive, plain or gzip, and unpacks what it
	// holds for this platform.
	Import(ctx context.Context, r io.Reader) ([]Image, error)
	Pull(ctx context.Context, ref string, plainHTTP bool) (Image, error)

	Version(ctx context.Context) (string, error)
	Close() error // tasks run on
}
