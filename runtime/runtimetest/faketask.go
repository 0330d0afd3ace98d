// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/logs"
)

var errFakeClosed = errors.New("container runtime closed")

// fakeTask is a task on a Node.
type fakeTask struct {
	node *Node
	spec runtime.Spec
	pid  uint32
	log  *logs.Writer
	main *fakeProc
	done chan struct{} // closed when exit is set and the log is complete

	mu      sync.Mutex
	state   runtime.State
	exit    runtime.Exit
	procs   map[*fakeProc]bool // all that run
	readers map[*reader]bool
}

// fakeProc is one process.
type fakeProc struct {
	s          *script
	stdin      *io.PipeWriter
	rows, cols atomic.Uint32
}

// reader is one attached conversation.
type reader struct {
	pieces chan outPiece // depth 64: more makes the process wait
	gone   chan struct{} // closed by the reader
}

type outPiece struct {
	stderr bool
	text   []byte
}

func newFakeTask(n *Node, pid uint32, s runtime.Spec) *fakeTask {
	cfg := logs.Config{Dir: s.LogDir, MaxBytes: s.LogMaxBytes, Files: s.LogFiles}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = runtime.DefaultLogMaxBytes
	}
	if cfg.Files == 0 {
		cfg.Files = runtime.DefaultLogFiles
	}
	t := &fakeTask{
		node: n, spec: s, pid: pid,
		log:     logs.OpenWriter(cfg),
		done:    make(chan struct{}),
		state:   runtime.StateCreated,
		procs:   map[*fakeProc]bool{},
		readers: map[*reader]bool{},
	}
	t.main = newProc(s.Command, t.env(nil), s.Workdir, s.Terminal || s.Stdin)
	t.main.s.first = true
	t.main.s.out = t.output
	return t
}

func (t *fakeTask) env(over []string) []string {
	return append([]string{"PATH=/bin:/usr/bin", "FROM_IMAGE=yes"}, append(t.spec.Env, over...)...)
}

func newProc(args, env []string, dir string, stdin bool) *fakeProc {
	if dir == "" {
		dir = "/"
	}
	p := &fakeProc{}
	p.s = &script{
		args: args, env: env, dir: dir,
		signals: make(chan syscall.Signal, 16),
		traps:   map[syscall.Signal]uint32{},
		size:    func() (uint32, uint32) { return p.rows.Load(), p.cols.Load() },
	}
	if stdin {
		p.s.stdin, p.stdin = io.Pipe()
	}
	return p
}

func (p *fakeProc) signal(sig syscall.Signal) {
	select {
	case p.s.signals <- sig:
	default:
	}
}

// output is the main process writing.
func (t *fakeTask) output(stderr bool, p []byte) {
	stream := logs.Stdout
	if stderr && !t.spec.Terminal {
		stream = logs.Stderr
	}
	t.log.Write(stream, p)
	t.mu.Lock()
	var to []*reader
	for r := range t.readers {
		to = append(to, r)
	}
	t.mu.Unlock()
	piece := outPiece{stream == logs.Stderr, append([]byte(nil), p...)}
	for _, r := range to {
		select {
		case r.pieces <- piece:
		case <-r.gone:
		}
	}
}

// end kills everything and waits for the log. It works in every state.
func (t *fakeTask) end() {
	t.mu.Lock()
	if t.state == runtime.StateCreated {
		t.finishLocked(128 + uint32(syscall.SIGKILL))
	}
	for p := range t.procs {
		p.signal(syscall.SIGKILL)
	}
	t.mu.Unlock()
	<-t.done
}

func (t *fakeTask) finishLocked(code uint32) {
	t.main.s.mu.Lock()
	oom := t.main.s.oom
	t.main.s.mu.Unlock()
	t.state = runtime.StateStopped
	t.exit = runtime.Exit{Code: code, Time: time.Now(), OOMKilled: oom}
	for p := range t.procs {
		p.signal(syscall.SIGKILL) // its namespace is gone
	}
	for r := range t.readers {
		close(r.pieces)
		delete(t.readers, r)
	}
	t.log.Close()
	close(t.done)
}

// handle is a fakeTask as one runtime sees it.
type handle struct {
	f *Fake
	*fakeTask
}

var _ runtime.Task = (*handle)(nil)

func (h *handle) ID() string  { return h.spec.ID }
func (h *handle) PID() uint32 { return h.pid }

func (h *handle) Start(context.Context) error {
	t := h.fakeTask
	if err := t.node.fault("start", t.spec.ID); err != nil {
		return fmt.Errorf("start %s: %w", t.spec.ID, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != runtime.StateCreated {
		return fmt.Errorf("start %s: state is %s", t.spec.ID, t.state)
	}
	t.state = runtime.StateRunning
	t.procs[t.main] = true
	go func() {
		code := t.main.s.run()
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.procs, t.main)
		t.finishLocked(code)
	}()
	return nil
}

func (h *handle) Wait(ctx context.Context) (runtime.Exit, error) {
	id := h.spec.ID
	if err := h.node.fault("wait", id); err != nil {
		return runtime.Exit{}, fmt.Errorf("wait for %s: %w", id, err)
	}
	select {
	case <-h.done:
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, fmt.Errorf("wait for %s: %w", id, ctx.Err())
	case <-h.f.ctx.Done():
		return runtime.Exit{}, fmt.Errorf("wait for %s: %w", id, errFakeClosed)
	}
}

func (h *handle) Kill(_ context.Context, sig syscall.Signal, all bool) error {
	t := h.fakeTask
	if err := t.node.fault("kill", t.spec.ID); err != nil {
		return fmt.Errorf("signal %s: %w", t.spec.ID, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.state == runtime.StateStopped:
		return fmt.Errorf("signal %s: %w", t.spec.ID, runtime.ErrNotRunning)
	case t.state == runtime.StateCreated:
		if sig == syscall.SIGKILL {
			t.finishLocked(128 + uint32(sig))
		}
	case all:
		for p := range t.procs {
			p.signal(sig)
		}
	default:
		t.main.signal(sig)
	}
	return nil
}

func (h *handle) Resize(_ context.Context, rows, cols uint32) error {
	if err := h.node.fault("resize", h.spec.ID); err != nil {
		return err
	}
	if !h.spec.Terminal {
		return fmt.Errorf("resize %s: %w", h.spec.ID, runtime.ErrNoTerminal)
	}
	h.main.rows.Store(rows)
	h.main.cols.Store(cols)
	return nil
}

func (h *handle) Status(context.Context) (runtime.Status, error) {
	if err := h.node.fault("status", h.spec.ID); err != nil {
		return runtime.Status{}, err
	}
	h.node.mu.Lock()
	there := h.node.tasks[h.spec.ID] == h.fakeTask
	h.node.mu.Unlock()
	if !there {
		return runtime.Status{}, fmt.Errorf("status of %s: %w", h.spec.ID, runtime.ErrNotFound)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == runtime.StateStopped {
		return runtime.Status{State: h.state, Exit: h.exit}, nil
	}
	return runtime.Status{State: h.state, PID: h.pid}, nil
}

func (h *handle) Attach(ctx context.Context, stdio runtime.IO) error {
	t := h.fakeTask
	if err := t.node.fault("attach", t.spec.ID); err != nil {
		return fmt.Errorf("attach to %s: %w", t.spec.ID, err)
	}
	if !t.spec.Terminal && !t.spec.Stdin {
		return fmt.Errorf("attach to %s: %w", t.spec.ID, runtime.ErrNoAttach)
	}
	r := &reader{pieces: make(chan outPiece, 64), gone: make(chan struct{})}
	t.mu.Lock()
	if t.state == runtime.StateStopped {
		t.mu.Unlock()
		return nil
	}
	t.readers[r] = true
	t.mu.Unlock()
	defer func() {
		close(r.gone)
		t.mu.Lock()
		delete(t.readers, r)
		t.mu.Unlock()
	}()
	if stdio.Stdin != nil {
		go feed(t.main, stdio.Stdin, r.gone, t.spec.Terminal)
	}
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("attach to %s: %w", t.spec.ID, ctx.Err())
		case p, ok := <-r.pieces:
			if !ok {
				return nil
			}
			if err := deliver(stdio, p); err != nil {
				return fmt.Errorf("attach to %s: %w", t.spec.ID, err)
			}
		}
	}
}

func deliver(stdio runtime.IO, p outPiece) error {
	w := stdio.Stdout
	if p.stderr {
		w = stdio.Stderr
	}
	if w == nil {
		return nil
	}
	_, err := w.Write(p.text)
	return err
}

// feed gives a process input; at its end the process's ends, too.
func feed(p *fakeProc, in io.Reader, gone <-chan struct{}, terminal bool) {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		select {
		case <-gone:
			return
		default:
		}
		if n > 0 {
			if _, werr := p.stdin.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			if !terminal {
				p.stdin.Close()
			}
			return
		}
	}
}

func (h *handle) Exec(_ context.Context, spec runtime.ExecSpec, stdio runtime.IO) (runtime.Process, error) {
	t := h.fakeTask
	if err := t.node.fault("exec", t.spec.ID); err != nil {
		return nil, fmt.Errorf("exec in %s: %w", t.spec.ID, err)
	}
	if len(spec.Command) == 0 {
		return nil, fmt.Errorf("exec in %s: %w", t.spec.ID, runtime.ErrInvalidSpec)
	}
	dir := spec.Workdir
	if dir == "" {
		dir = t.spec.Workdir
	}
	p := newProc(spec.Command, t.env(spec.Env), dir, stdio.Stdin != nil)
	p.rows.Store(spec.Rows)
	p.cols.Store(spec.Cols)
	var out sync.Mutex
	p.s.out = func(stderr bool, b []byte) {
		out.Lock()
		defer out.Unlock()
		_ = deliver(stdio, outPiece{stderr && !spec.Terminal, b})
	}
	t.node.mu.Lock()
	t.node.pid++
	e := &fakeExec{t: t, p: p, pid: t.node.pid, terminal: spec.Terminal, over: make(chan struct{})}
	t.node.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state != runtime.StateRunning {
		return nil, fmt.Errorf("exec in %s: %w", t.spec.ID, runtime.ErrNotRunning)
	}
	if !programs[spec.Command[0]] {
		return nil, fmt.Errorf("exec in %s: %w: exec: %q: not found", t.spec.ID, runtime.ErrCommand, spec.Command[0])
	}
	t.procs[p] = true
	gone := make(chan struct{})
	if stdio.Stdin != nil {
		go feed(p, stdio.Stdin, gone, spec.Terminal)
	}
	go func() {
		code := p.s.run()
		close(gone)
		t.mu.Lock()
		delete(t.procs, p)
		t.mu.Unlock()
		e.exit = runtime.Exit{Code: code, Time: time.Now()}
		close(e.over)
	}()
	return e, nil
}

// fakeExec is an exec'd process.
type fakeExec struct {
	t        *fakeTask
	p        *fakeProc
	pid      uint32
	terminal bool
	over     chan struct{} // closed when exit is set
	exit     runtime.Exit
}

func (e *fakeExec) ID() string  { return fmt.Sprintf("exec%d", e.pid) }
func (e *fakeExec) PID() uint32 { return e.pid }

func (e *fakeExec) Wait(ctx context.Context) (runtime.Exit, error) {
	select {
	case <-e.over:
		return e.exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, fmt.Errorf("wait for exec in %s: %w", e.t.spec.ID, ctx.Err())
	}
}

func (e *fakeExec) Kill(_ context.Context, sig syscall.Signal) error {
	select {
	case <-e.over:
		return fmt.Errorf("signal exec in %s: %w", e.t.spec.ID, runtime.ErrNotRunning)
	default:
		e.p.signal(sig)
		return nil
	}
}

func (e *fakeExec) Resize(_ context.Context, rows, cols uint32) error {
	if !e.terminal {
		return fmt.Errorf("resize exec in %s: %w", e.t.spec.ID, runtime.ErrNoTerminal)
	}
	e.p.rows.Store(rows)
	e.p.cols.Store(cols)
	return nil
}
