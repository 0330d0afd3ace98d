// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
)

// fakeNode is a node in memory. Its clock moves one second with every thing
// that it records, its ids come from a counter, and its commands are scripts of
// the few words that process.run knows.
type fakeNode struct {
	nodev1.UnimplementedNodeServer

	t    testing.TB
	sock string

	mu      sync.Mutex
	ticks   int64
	boxes   []*box
	made    int // sandboxes ever
	images  []*nodev1.Image
	changed chan struct{} // closed and replaced at every change
	gate    chan struct{} // Create waits for it to be closed; nil: does not
	held    chan struct{} // scripts that hold wait for it to be closed by the test
	stops   []int64       // graces of the Stop requests, as they came
	creates int           // Create requests, as they came
	waits   int           // Wait requests, as they came
	flows   []*nodev1.FlowsResponse
	late    bool // Attach to a command that is over answers its exit code
	info    *nodev1.NodeInfoResponse

	server *grpc.Server
	served chan struct{} // closed when server has stopped serving
}

// box is one sandbox.
type box struct {
	s      *sandboxv1.Sandbox
	log    []*nodev1.LogsResponse
	events []*nodev1.Event
	stop   chan int64  // graces; never closed; deep enough for every test
	stdin  chan []byte // closed by whoever attached last; nil without stdin
	size   chan *nodev1.Resize
	live   []chan *nodev1.ExecResponse // who is attached
}

var epoch = time.Date(2026, 11, 2, 10, 0, 0, 0, time.UTC)

func newFakeNode(t testing.TB) *fakeNode {
	t.Helper()
	f := &fakeNode{t: t, sock: filepath.Join(t.TempDir(), "agent.sock"), changed: make(chan struct{}), held: make(chan struct{}),
		info: &nodev1.NodeInfoResponse{NodeId: "node-7f", Version: "1.2.0", Kernel: "6.12.5", CpuMillis: 8000, MemoryBytes: 16 << 30,
			ContainerdVersion: "v2.2.1", CgroupMode: "unified", EgressHook: "tcx", MaxConnections: 4096,
			PublishPorts: "30000-30999", ResolverUpstreams: []string{"192.0.2.53:53"}, Pid: 812, StartedNs: epoch.UnixNano(),
			Spool: &nodev1.Spool{FirstSeq: 41, LastSeq: 1207, AckedSeq: 1200, Bytes: 91 << 10, LimitBytes: 256 << 20,
				Gateway: "gw.example.com:7443", State: "connected"}},
		images: []*nodev1.Image{
			{Reference: "docker.io/library/alpine:3.22", Digest: "sha256:4bcff63911fc", SizeBytes: 3 << 20, CreatedNs: epoch.UnixNano()},
		}}
	f.start()
	t.Cleanup(f.halt)
	return f
}

func (f *fakeNode) start() {
	f.t.Helper()
	os.Remove(f.sock)
	l, err := net.Listen("unix", f.sock)
	if err != nil {
		f.t.Fatal(err)
	}
	f.server, f.served = grpc.NewServer(), make(chan struct{})
	nodev1.RegisterNodeServer(f.server, f)
	go func(s *grpc.Server, done chan struct{}) {
		s.Serve(l)
		close(done)
	}(f.server, f.served)
}

// halt is a crash of the agent: connections break, sandboxes run on.
func (f *fakeNode) halt() {
	f.server.Stop()
	<-f.served
}

// tick is called with mu held.
func (f *fakeNode) tick() int64 {
	f.ticks++
	return epoch.Add(time.Duration(f.ticks) * time.Second).UnixNano()
}

// signal is called with mu held.
func (f *fakeNode) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// until waits for ok, which is called with mu held and may do work.
func (f *fakeNode) until(ctx context.Context, ok func() bool) error {
	for {
		f.mu.Lock()
		done, changed := ok(), f.changed
		f.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// set changes something about the node.
func (f *fakeNode) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// live is how many sandboxes there are, id the id of one of them.
func (f *fakeNode) live() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.boxes)
}

func (f *fakeNode) id(n int) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.boxes[n].s.GetId()
}

// find is called with mu held.
func (f *fakeNode) find(ref string) (*box, error) {
	tenant, name, scoped := strings.Cut(ref, ":")
	for _, b := range f.boxes {
		spec := b.s.GetSpec()
		switch {
		case b.s.GetId() == ref, len(ref) >= 4 && strings.HasPrefix(b.s.GetId(), ref), spec.GetName() == ref,
			scoped && spec.GetTenant() == tenant && spec.GetName() == name:
			return b, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "no sandbox %s", ref)
}

func (f *fakeNode) Create(ctx context.Context, req *nodev1.CreateRequest) (*nodev1.CreateResponse, error) {
	f.mu.Lock()
	f.creates++
	gate := f.gate
	f.signal()
	f.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	spec := proto.Clone(req.GetSpec()).(*sandboxv1.Spec)
	if err := f.admit(spec); err != nil {
		return nil, err
	}
	f.made++
	n := f.made
	sum := sha256.Sum256(fmt.Append(nil, "sandbox ", n))
	id := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:12]
	if spec.Name == "" {
		spec.Name = "sb-" + id
	}
	b := &box{stop: make(chan int64, 16), size: make(chan *nodev1.Resize, 16), s: &sandboxv1.Sandbox{
		Id: id, Spec: spec, State: sandboxv1.State_STATE_RUNNING, CreatedNs: f.tick(), StartedNs: f.tick(), CreatedBy: "uid:1000",
		Addresses: []string{fmt.Sprintf("100.96.0.%d", n), fmt.Sprintf("fd62:6b68::%x", n)}, ImageDigest: "sha256:4bcff63911fc",
		PolicyRev: 1, Pid: int64(4000 + n), Node: "node-7f", NotEnforced: f.info.GetNotEnforced()}}
	if spec.GetStdin() {
		b.stdin = make(chan []byte, 64)
	}
	b.events = []*nodev1.Event{{TimeNs: b.s.CreatedNs, Kind: "created", Message: "admitted for uid:1000"},
		{TimeNs: b.s.StartedNs, Kind: "started", Message: "egress enforced, command started"}}
	f.boxes = append(f.boxes, b)
	f.signal()
	answer := proto.Clone(b.s).(*sandboxv1.Sandbox)
	go func() {
		p := &process{in: b.stdin, stop: b.stop, size: b.size, emit: func(s nodev1.Stream, data string) { f.write(b, s, data) },
			wait: func() { f.awaitAttached(b) }, held: f.held}
		f.finish(b, p.run(script(spec.GetCommand())))
	}()
	return &nodev1.CreateResponse{Sandbox: answer}, nil
}

func script(command []string) string {
	if len(command) == 3 && command[0] == "sh" {
		return command[2]
	}
	return strings.Join(command, " ")
}

// admit is called with mu held.
func (f *fakeNode) admit(spec *sandboxv1.Spec) error {
	if !strings.HasPrefix(spec.GetTenant()+"/", "acme/") {
		return denied(codes.NotFound, "tenant "+spec.GetTenant()+" is not known here (did you mean acme?)", &nodev1.Denial{Reason: "tenant_unknown"})
	}
	if strings.HasPrefix(spec.GetImage(), "forbidden") {
		return denied(codes.PermissionDenied, "image not allowed for "+spec.GetTenant()+": "+spec.GetImage(),
			&nodev1.Denial{Reason: "policy", SetBy: "acme"})
	}
	if strings.HasPrefix(spec.GetImage(), "missing") {
		return status.Errorf(codes.NotFound, "image %s is not on this node", spec.GetImage())
	}
	used := int64(0)
	for _, b := range f.boxes {
		if b.s.GetExit() == nil {
			used += b.s.GetSpec().GetLimits().GetMemoryBytes()
		}
		if b.s.GetSpec().GetName() == spec.GetName() && spec.GetName() != "" {
			return status.Errorf(codes.AlreadyExists, "%s has a sandbox named %s (%s)", spec.GetTenant(), spec.GetName(), b.s.GetId())
		}
	}
	want := spec.GetLimits().GetMemoryBytes()
	if used+want > 1<<30 {
		return denied(codes.ResourceExhausted, "quota", &nodev1.Denial{Reason: "quota", Resource: "memory_bytes", Limit: 1 << 30,
			InUse: used, Want: want, SetBy: "acme", File: "/etc/bulkhead/tenants/acme.yaml"})
	}
	for _, p := range spec.GetPublish() {
		if p.GetHost() < 30000 {
			return denied(codes.ResourceExhausted, fmt.Sprintf("port %d of the node cannot be published for %s: this node publishes 30000-30999 (network.publish_ports)",
				p.GetHost(), spec.GetTenant()), &nodev1.Denial{Reason: "publish_port", Resource: "host_port", Want: int64(p.GetHost()), SetBy: "node"})
		}
	}
	if spec.GetLimits().GetCpuMillis() > 8000 {
		return denied(codes.ResourceExhausted, "full", &nodev1.Denial{Reason: "node_capacity", Resource: "cpu_millis", Limit: 8000,
			InUse: 500, Want: spec.GetLimits().GetCpuMillis(), SetBy: "node"})
	}
	return nil
}

func denied(code codes.Code, msg string, d *nodev1.Denial) error {
	st, err := status.New(code, msg).WithDetails(d)
	if err != nil {
		panic(err)
	}
	return st.Err()
}

// write records output and hands it to those attached.
func (f *fakeNode) write(b *box, s nodev1.Stream, data string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for line := range strings.Lines(data) {
		b.log = append(b.log, &nodev1.LogsResponse{Stream: s, TimeNs: f.tick(), Data: []byte(line)})
	}
	m := &nodev1.ExecResponse{Message: &nodev1.ExecResponse_Stdout{Stdout: []byte(data)}}
	if s == nodev1.Stream_STREAM_STDERR {
		m = &nodev1.ExecResponse{Message: &nodev1.ExecResponse_Stderr{Stderr: []byte(data)}}
	}
	for _, l := range b.live {
		l <- m
	}
	f.signal()
}

func (f *fakeNode) awaitAttached(b *box) {
	f.until(context.Background(), func() bool { return len(b.live) > 0 })
}

func (f *fakeNode) finish(b *box, e *sandboxv1.Exit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e.TimeNs = f.tick()
	b.s.State, b.s.Exit, b.s.Pid = sandboxv1.State_STATE_STOPPED, e, 0
	b.events = append(b.events, &nodev1.Event{TimeNs: e.TimeNs, Kind: "stopped", Message: fmt.Sprintf("exit code %d", e.Code)})
	for _, l := range b.live {
		l <- &nodev1.ExecResponse{Message: &nodev1.ExecResponse_ExitCode{ExitCode: e.Code}}
	}
	if b.s.GetSpec().GetAutoRemove() {
		f.remove(b)
	}
	f.signal()
}

// remove is called with mu held.
func (f *fakeNode) remove(b *box) {
	for i, other := range f.boxes {
		if other == b {
			f.boxes = append(f.boxes[:i:i], f.boxes[i+1:]...)
		}
	}
}

// process is a command.
type process struct {
	in   <-chan []byte
	stop <-chan int64
	size <-chan *nodev1.Resize
	sig  <-chan int32 // exec only
	emit func(nodev1.Stream, string)
	wait func() // until somebody is attached
	held <-chan struct{}

	onTerm int32
}

// run does the words of a script, separated by semicolons.
func (p *process) run(script string) *sandboxv1.Exit {
	p.onTerm = 143
	for _, step := range strings.Split(script, ";") {
		verb, arg, _ := strings.Cut(strings.TrimSpace(step), " ")
		n := int32(0)
		fmt.Sscan(arg, &n)
		switch verb {
		case "", "true":
		case "hold":
			<-p.held
		case "attached":
			p.wait()
		case "echo":
			stream := nodev1.Stream_STREAM_STDOUT
			if text, ok := strings.CutSuffix(arg, ">&2"); ok {
				arg, stream = strings.TrimSpace(text), nodev1.Stream_STREAM_STDERR
			}
			p.emit(stream, arg+"\n")
		case "printf":
			p.emit(nodev1.Stream_STREAM_STDOUT, strings.ReplaceAll(arg, `\xff`, "\xff"))
		case "flood":
			for i := range n {
				p.emit(nodev1.Stream_STREAM_STDOUT, fmt.Sprintln("line", i))
			}
		case "trap":
			p.onTerm = n
		case "sleep":
			if n > 0 {
				time.Sleep(time.Duration(n) * time.Millisecond)
				continue
			}
			return p.sleep()
		case "cat":
			for data := range p.in {
				p.emit(nodev1.Stream_STREAM_STDOUT, string(data))
			}
		case "read":
			p.emit(nodev1.Stream_STREAM_STDOUT, fmt.Sprintf("got %q\n", <-p.in))
		case "size":
			r := <-p.size
			p.emit(nodev1.Stream_STREAM_STDOUT, fmt.Sprintf("%d x %d\n", r.GetRows(), r.GetCols()))
		case "oom":
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_OOM, Code: 137, Signal: 9, Message: "out of memory at its limit"}
		case "ttl":
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_TTL, Code: 137, Signal: 9, Message: "lifetime is over"}
		case "crash":
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_SIGNALED, Code: 128 + n, Signal: n}
		case "nostart":
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_LAUNCH_FAILED, Code: 1, Message: "exec: nostart: \x1b[2Jno such file"}
		case "lost":
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_LOST, Message: "the machine was rebooted"}
		case "exit":
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_EXITED, Code: n}
		default:
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_EXITED, Code: 127}
		}
	}
	return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_EXITED}
}

// sleep is until somebody stops it. A command with "trap -1" ignores TERM and
// has to be killed.
func (p *process) sleep() *sandboxv1.Exit {
	for {
		select {
		case sig := <-p.sig:
			return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_SIGNALED, Code: 128 + sig, Signal: sig}
		case grace := <-p.stop:
			code := p.onTerm
			if grace < 0 {
				code = 137
			}
			if code >= 0 {
				return &sandboxv1.Exit{Reason: sandboxv1.ExitReason_EXIT_REASON_STOPPED, Code: code, By: "uid:1000"}
			}
		}
	}
}
