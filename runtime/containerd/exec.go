// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// execDir holds the FIFOs of a task's exec'd processes, in its own directory.
// The names in it are the exec ids that containerd may know.
const execDir = "exec"

// process is one exec'd process.
type process struct {
	t        *task
	id       string
	pid      uint32
	terminal bool

	over chan struct{} // closed by tend when exit and err are set
	exit runtime.Exit
	err  error
}

var _ runtime.Process = (*process)(nil)

func (p *process) ID() string  { return p.id }
func (p *process) PID() uint32 { return p.pid }

// Exec starts another process in the task.
func (t *task) Exec(ctx context.Context, spec runtime.ExecSpec, stdio runtime.IO) (runtime.Process, error) {
	p, err := t.exec(ctx, spec, stdio)
	if err != nil {
		return nil, fmt.Errorf("exec in %s: %w", t.id, err)
	}
	return p, nil
}

func (t *task) exec(ctx context.Context, spec runtime.ExecSpec, stdio runtime.IO) (*process, error) {
	oci, err := t.execProcess(spec)
	if err != nil {
		return nil, err
	}
	specAny, err := typeurl.MarshalAny(oci)
	if err != nil {
		return nil, fmt.Errorf("encode process: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := &process{
		t:        t,
		id:       randomID(),
		terminal: spec.Terminal,
		over:     make(chan struct{}),
	}
	dir := filepath.Join(t.r.fifoDir(t.id), execDir, p.id)
	f, err := makeFIFOs(dir, stdio.Stdin != nil, !spec.Terminal)
	if err != nil {
		return nil, err
	}
	ctx, cancel := t.r.finish(ctx)
	defer cancel()
	if err := p.start(ctx, f, typeurl.MarshalProto(specAny)); err != nil {
		f.close()
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	f.release()
	t.r.wg.Go(func() { p.tend(f, stdio) })
	return p, nil
}

// start registers and starts the process, or leaves none.
func (p *process) start(ctx context.Context, f *fifos, spec *anypb.Any) error {
	t := p.t
	_, err := t.r.tasks.Exec(ctx, &tasksapi.ExecProcessRequest{
		ContainerID: t.id, ExecID: p.id,
		Stdin: f.stdin, Stdout: f.stdout, Stderr: f.stderr, Terminal: p.terminal,
		Spec: spec,
	})
	if err != nil {
		return notRunning(err)
	}
	resp, err := t.r.tasks.Start(ctx, &tasksapi.StartRequest{ContainerID: t.id, ExecID: p.id})
	if err != nil {
		n := notRunning(err)
		if !errors.Is(n, runtime.ErrNotRunning) {
			n = commandError(n)
		}
		return errors.Join(n, p.remove(ctx))
	}
	p.pid = resp.Pid
	return nil
}

// remove deletes the process from containerd.
func (p *process) remove(ctx context.Context) error {
	_, err := p.t.r.tasks.DeleteProcess(ctx, &tasksapi.DeleteProcessRequest{ContainerID: p.t.id, ExecID: p.id})
	if err = native(err); isNotFound(err) || isUnavailable(err) {
		return nil // with its task, or by the next Find
	}
	return err
}

// tend carries the process's streams until it is over, then clears it away.
func (p *process) tend(f *fifos, stdio runtime.IO) {
	r := p.t.r
	defer close(p.over)
	var out sync.WaitGroup
	exited := make(chan struct{}) // closed here when the process is over
	for _, s := range []struct {
		file *os.File
		w    io.Writer
	}{{f.out, stdio.Stdout}, {f.err, stdio.Stderr}} {
		if s.file != nil {
			out.Go(func() { carry(s.w, s.file, exited) })
		}
	}
	if f.in != nil {
		// Its read may block for ever; it ends with the read after the file is
		// closed.
		go p.feed(f.in, stdio.Stdin)
	}
	p.exit, p.err = r.waitProcess(r.ctx, p.t.id, p.id)
	if isNotFound(p.err) {
		// It went with its task, which a signal to all has ended.
		p.exit, p.err = runtime.Exit{Code: 128 + uint32(syscall.SIGKILL), Time: time.Now()}, nil
	}
	close(exited)
	for _, file := range []*os.File{f.out, f.err} {
		if file != nil {
			_ = file.SetReadDeadline(time.Now().Add(outputGrace))
		}
	}
	drained := make(chan struct{})
	go func() {
		out.Wait()
		close(drained)
	}()
	select {
	case <-drained:
	case <-r.ctx.Done():
		// A writer may block for ever; it is not ours to wait for. The FIFOs
		// stay: they name the process to the next Find.
		p.err = errClosed
		f.close()
		return
	}
	f.close()
	ctx, cancel := r.bound(r.ctx)
	defer cancel()
	if err := p.remove(ctx); err != nil {
		r.log.Warn("remove exec'd process", "sandbox", p.t.id, "exec", p.id, "err", err)
		return
	}
	if err := os.RemoveAll(f.dir); err != nil {
		r.log.Warn("remove FIFOs", "sandbox", p.t.id, "exec", p.id, "err", err)
	}
}

// carry copies output until it ends. Once the process is over it also ends when
// nothing has come for outputGrace: something that the process has started may
// hold the pipe for ever. A writer that fails does not stop the process.
func carry(w io.Writer, file *os.File, exited <-chan struct{}) {
	if w == nil {
		w = io.Discard
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := file.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				w = io.Discard
			}
		}
		if err != nil {
			return
		}
		select {
		case <-exited:
			_ = file.SetReadDeadline(time.Now().Add(outputGrace))
		default:
		}
	}
}

// feed carries input. At its end the process's input ends, unless it has a
// terminal, which would be hung up by that.
func (p *process) feed(in *os.File, r io.Reader) {
	_, err := io.Copy(in, r)
	if err != nil || p.terminal {
		return
	}
	in.Close()
	ctx, cancel := p.t.r.bound(p.t.r.ctx)
	defer cancel()
	if err := p.t.r.closeIO(ctx, p.t.id, p.id); err != nil && !isNotFound(err) && ctx.Err() == nil {
		p.t.r.log.Debug("close stdin", "sandbox", p.t.id, "exec", p.id, "err", err)
	}
}

// Wait blocks until the process is over and its output delivered.
func (p *process) Wait(ctx context.Context) (runtime.Exit, error) {
	select {
	case <-p.over:
	case <-ctx.Done():
		return runtime.Exit{}, fmt.Errorf("wait for exec in %s: %w", p.t.id, ctx.Err())
	}
	if p.err != nil {
		return runtime.Exit{}, fmt.Errorf("wait for exec in %s: %w", p.t.id, p.err)
	}
	return p.exit, nil
}

// Kill signals the process.
func (p *process) Kill(ctx context.Context, sig syscall.Signal) error {
	ctx, cancel := p.t.r.bound(ctx)
	defer cancel()
	_, err := p.t.r.tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: p.t.id, ExecID: p.id, Signal: uint32(sig)})
	if err != nil {
		return fmt.Errorf("signal exec in %s: %w", p.t.id, notRunning(err))
	}
	return nil
}

// Resize sets the size of the terminal.
func (p *process) Resize(ctx context.Context, rows, cols uint32) error {
	if !p.terminal {
		return fmt.Errorf("resize exec in %s: %w", p.t.id, runtime.ErrNoTerminal)
	}
	if err := p.t.r.resize(ctx, p.t.id, p.id, rows, cols); err != nil {
		return fmt.Errorf("resize exec in %s: %w", p.t.id, err)
	}
	return nil
}

// execProcess is the task's own process with the exec's changes. Whatever
// confines the task confines it too.
func (t *task) execProcess(spec runtime.ExecSpec) (*specs.Process, error) {
	bad := func(what string) (*specs.Process, error) {
		return nil, fmt.Errorf("%w: %s", runtime.ErrInvalidSpec, what)
	}
	if len(spec.Command) == 0 || spec.Command[0] == "" {
		return bad("no command")
	}
	if len(spec.Command) > runtime.MaxArgs || len(spec.Env) > runtime.MaxEnv {
		return bad("too many arguments or variables")
	}
	total := 0
	for _, v := range slices.Concat(spec.Command, spec.Env, []string{spec.Workdir, spec.User}) {
		if strings.ContainsRune(v, 0) {
			return bad("a NUL byte in an argument or variable")
		}
		total += len(v) + 1
	}
	if total > runtime.MaxSpecBytes {
		return bad("arguments and variables too long")
	}
	for _, kv := range spec.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" {
			return bad(fmt.Sprintf("variable %.40q is not NAME=value", kv))
		}
	}
	if spec.Workdir != "" && !filepath.IsAbs(spec.Workdir) {
		return bad(fmt.Sprintf("workdir %q is not an absolute path", spec.Workdir))
	}
	p := *t.process
	p.Args = spec.Command
	p.Env = slices.DeleteFunc(slices.Clone(p.Env), func(kv string) bool {
		return !spec.Terminal && kv == termEnv
	})
	if spec.Terminal {
		p.Env = mergeEnv([]string{termEnv}, p.Env)
	}
	if spec.User != "" {
		who, err := t.r.liveUser(t, spec.User)
		if err != nil {
			return nil, err
		}
		p.User = who.user
		p.Env = mergeEnv(p.Env, []string{homeEnv + who.home})
	}
	p.Env = mergeEnv(p.Env, spec.Env)
	if spec.Workdir != "" {
		p.Cwd = spec.Workdir
	}
	p.Terminal = spec.Terminal
	p.ConsoleSize = nil
	if spec.Terminal && spec.Rows > 0 && spec.Cols > 0 {
		p.ConsoleSize = &specs.Box{Height: uint(spec.Rows), Width: uint(spec.Cols)}
	}
	p.Capabilities = capabilitiesOf(p.User)
	return &p, nil
}

// endExecs kills the exec'd processes that an earlier process of ours has left:
// nobody reads their output any more.
func (r *Runtime) endExecs(ctx context.Context, id string) error {
	dir := filepath.Join(r.fifoDir(id), execDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list exec'd processes: %w", err)
	}
	ctx, cancel := r.bound(ctx)
	defer cancel()
	for _, e := range entries {
		execID := e.Name()
		_, err := r.tasks.Kill(ctx, &tasksapi.KillRequest{ContainerID: id, ExecID: execID, Signal: uint32(syscall.SIGKILL)})
		if err == nil {
			// The shim waits for its output to be read before it lets go.
			f := &fifos{stdout: filepath.Join(dir, execID, "stdout"), stderr: filepath.Join(dir, execID, "stderr")}
			if err := f.open(); err == nil {
				for _, file := range []*os.File{f.out, f.err} {
					if file != nil {
						go func() { _, _ = io.Copy(io.Discard, file) }()
					}
				}
			}
			_, err = r.tasks.Wait(ctx, &tasksapi.WaitRequest{ContainerID: id, ExecID: execID})
			f.close()
		}
		if err != nil && !errors.Is(notRunning(err), runtime.ErrNotRunning) {
			return fmt.Errorf("end left-over exec %s: %w", execID, native(err))
		}
		_, err = r.tasks.DeleteProcess(ctx, &tasksapi.DeleteProcessRequest{ContainerID: id, ExecID: execID})
		if err != nil && !isNotFound(err) {
			r.log.WarnContext(ctx, "remove left-over exec", "sandbox", id, "exec", execID, "err", native(err))
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, execID)); err != nil {
			return fmt.Errorf("remove FIFOs of left-over exec: %w", err)
		}
	}
	return nil
}
