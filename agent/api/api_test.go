// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/api"
	"github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/agent/spool"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/agent/supervisor/supervisortest"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/tenant"
	"github.com/bulkheadhq/bulkhead/test/need"
)

// Users of the node; testdata/tenants says what they are members of.
const (
	root    = 0
	acme    = 61000 // of acme, and so of acme/vision
	vision  = 61001 // of acme/vision alone
	globex  = 61002
	nobody  = 61003
	nowhere = "nosuchsandbx"
)

// node is a served API on a miniature of a machine.
type node struct {
	t      *testing.T
	m      *supervisortest.Machine
	kernel *kernel
	flows  *egress.Hub
	socket string
	reload error // what Reload answers
}

func serve(t *testing.T) *node {
	t.Helper()
	// Not t.TempDir: other users must reach the socket.
	dir, err := os.MkdirTemp("", "bh-api-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, m: supervisortest.NewMachine(), kernel: &kernel{}, socket: filepath.Join(dir, "agent.sock")}
	n.flows = egress.New(egress.Config{Live: func(string) bool { return true }})
	st, err := store.Open(filepath.Join(dir, "bulkhead.db"))
	if err != nil {
		t.Fatal(err)
	}
	sp, err := spool.Open(spool.Config{Dir: filepath.Join(dir, "spool"), NodeID: supervisortest.NodeID})
	if err != nil {
		t.Fatal(err)
	}
	set, err := tenant.Load("testdata/tenants")
	if err != nil {
		t.Fatal(err)
	}
	cfg := n.m.Process(st).Config(dir, set, sp)
	sup, err := supervisor.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(n.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran, served, ready := make(chan error, 1), make(chan error, 1), make(chan struct{})
	go func() { ran <- sup.Run(ctx, ready) }()
	<-ready
	go func() {
		served <- api.Serve(ctx, api.Config{
			Sandboxes: sup, Images: n.m.Node.Open(), NodeID: supervisortest.NodeID,
			Traffic: n.kernel, Limits: n.kernel, Resolver: n.kernel, Links: n.kernel, Enforced: n.kernel.enforced,
			Flows: n.flows, MaxConnections: 4096,
			LogDir: func(id string) string { return filepath.Join(dir, "logs", id) },
			NodeInfo: func(context.Context) (*nodev1.NodeInfoResponse, error) {
				return &nodev1.NodeInfoResponse{NodeId: "n"}, nil
			},
			Reload: func(context.Context) (int, int, error) { return 3, 1, n.reload },
			Usage:  sup.Usage,
		}, l)
	}()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-served, <-ran, sp.Close(), st.Close()); err != nil {
			t.Error(err)
		}
		for _, v := range n.m.Violations() {
			t.Errorf("broken rule: %s", v)
		}
	})
	return n
}

// as answers a client whose connection was made by a user. The kernel notes who
// connects, so only that one system call needs the user's identity; it is made
// on a thread that is thrown away.
func (n *node) as(uid int) nodev1.NodeClient {
	n.t.Helper()
	dial := func(context.Context, string) (net.Conn, error) {
		type result struct {
			c   net.Conn
			err error
		}
		results := make(chan result, 1)
		go func() {
			goruntime.LockOSThread() // never unlocked
			c, err := connect(uid, n.socket)
			results <- result{c, err}
		}()
		r := <-results
		return r.c, r.err
	}
	conn, err := grpc.NewClient("passthrough:///node", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return nodev1.NewNodeClient(conn)
}

func connect(uid int, path string) (net.Conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
		return nil, fmt.Errorf("become uid %d: %w", uid, errno)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("connect as uid %d: %w", uid, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	return net.FileConn(f)
}

func create(name, tenantPath, command string) *nodev1.CreateRequest {
	return &nodev1.CreateRequest{Spec: &sandboxv1.Spec{
		Name: name, Tenant: tenantPath, Image: supervisortest.Image, Command: []string{"sh", "-c", command},
	}}
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: got %s (%v), want %s", what, got, err, want)
	}
}

// TestWhoMayDoWhat: the kernel says who calls. What a caller has no part in
// does not exist for it.
func TestWhoMayDoWhat(t *testing.T) {
	need.Root(t)
	n := serve(t)
	ctx := t.Context()
	ids := map[string]string{}
	for uid, path := range map[int]string{acme: "acme", vision: "acme/vision", globex: "globex"} {
		resp, err := n.as(uid).Create(ctx, create("box", path, "trap 'exit 0' TERM; sleep 60"))
		if err != nil {
			t.Fatalf("create in %s: %v", path, err)
		}
		ids[path] = resp.Sandbox.Id
		if want := fmt.Sprintf("uid:%d", uid); resp.Sandbox.CreatedBy != want {
			t.Errorf("created by %s, want %s", resp.Sandbox.CreatedBy, want)
		}
	}
	for _, c := range []struct {
		uid  int
		sees []string
		not  []string
	}{
		{root, []string{"acme", "acme/vision", "globex"}, nil},
		{acme, []string{"acme", "acme/vision"}, []string{"globex"}},
		{vision, []string{"acme/vision"}, []string{"acme", "globex"}},
		{globex, []string{"globex"}, []string{"acme", "acme/vision"}},
		{nobody, nil, []string{"acme", "acme/vision", "globex"}},
	} {
		client := n.as(c.uid)
		list, err := client.List(ctx, &nodev1.ListRequest{All: true})
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Sandboxes) != len(c.sees) {
			t.Errorf("uid %d lists %d sandboxes, want %d", c.uid, len(list.Sandboxes), len(c.sees))
		}
		tenants, err := client.ListTenants(ctx, &nodev1.ListTenantsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if len(tenants.Tenants) != len(c.sees) {
			t.Errorf("uid %d lists %d tenants, want %d", c.uid, len(tenants.Tenants), len(c.sees))
		}
		usage, err := client.Usage(ctx, &nodev1.UsageRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range usage.Rows {
			if !strings.Contains(" "+strings.Join(c.sees, " ")+" ", " "+row.Tenant+" ") {
				t.Errorf("uid %d sees usage of %s", c.uid, row.Tenant)
			}
		}
		if seen := n.watched(client); len(seen) != len(c.sees) {
			t.Errorf("uid %d watches %v, want %v", c.uid, seen, c.sees)
		}
		for _, path := range c.sees {
			_, err := client.Get(ctx, &nodev1.GetRequest{Ref: ids[path]})
			wantCode(t, fmt.Sprintf("uid %d gets %s's", c.uid, path), err, codes.OK)
		}
		for _, path := range c.not {
			n.hidden(client, fmt.Sprintf("uid %d, sandbox of %s", c.uid, path), ids[path])
			_, err := client.Create(ctx, create("x", path, "exit 0"))
			wantCode(t, fmt.Sprintf("uid %d creates in %s", c.uid, path), err, codes.PermissionDenied)
		}
		if c.uid != root {
			_, err := client.Create(ctx, create("x", "initech", "exit 0"))
			wantCode(t, fmt.Sprintf("uid %d creates in a tenant that is not there", c.uid), err, codes.PermissionDenied)
			_, err = client.Reload(ctx, &nodev1.ReloadRequest{})
			wantCode(t, fmt.Sprintf("uid %d reloads", c.uid), err, codes.PermissionDenied)
			_, err = client.PullImage(ctx, &nodev1.PullImageRequest{Reference: "x"})
			wantCode(t, fmt.Sprintf("uid %d pulls", c.uid), err, codes.PermissionDenied)
			wantCode(t, fmt.Sprintf("uid %d imports", c.uid), importImage(ctx, client), codes.PermissionDenied)
		}
	}
	// "box" is unique among what one may see, not among what there is.
	got := must[*nodev1.GetResponse](t)(n.as(globex).Get(ctx, &nodev1.GetRequest{Ref: "box"}))
	if got.Sandbox.Id != ids["globex"] {
		t.Errorf("globex's box is %s, want %s", got.Sandbox.Id, ids["globex"])
	}
	_, err := n.as(root).Get(ctx, &nodev1.GetRequest{Ref: "box"})
	wantCode(t, "a name that three have", err, codes.InvalidArgument)
	for uid, path := range map[int]string{acme: "acme", vision: "acme/vision", globex: "globex"} {
		resp := must[*nodev1.StopResponse](t)(n.as(uid).Stop(ctx, &nodev1.StopRequest{Ref: ids[path], GraceMs: 5000}))
		if want := fmt.Sprintf("uid:%d", uid); resp.Sandbox.Exit.By != want || resp.Sandbox.Exit.Reason != sandboxv1.ExitReason_EXIT_REASON_STOPPED {
			t.Errorf("stopped: %v, want by %s", resp.Sandbox.Exit, want)
		}
	}
}

// hidden asserts that every call that takes a reference answers NotFound, as
// for one that is not there.
func (n *node) hidden(c nodev1.NodeClient, what, id string) {
	n.t.Helper()
	ctx := n.t.Context()
	for _, ref := range []string{id, id[:6], nowhere} {
		for name, call := range map[string]func() error{
			"get":    func() error { _, err := c.Get(ctx, &nodev1.GetRequest{Ref: ref}); return err },
			"stop":   func() error { _, err := c.Stop(ctx, &nodev1.StopRequest{Ref: ref}); return err },
			"delete": func() error { _, err := c.Delete(ctx, &nodev1.DeleteRequest{Ref: ref, Force: true}); return err },
			"wait":   func() error { _, err := c.Wait(ctx, &nodev1.WaitRequest{Ref: ref}); return err },
			"usage":  func() error { _, err := c.Usage(ctx, &nodev1.UsageRequest{Ref: ref}); return err },
			"explain": func() error {
				_, err := c.Explain(ctx, &nodev1.ExplainRequest{Ref: ref, Protocol: "tcp", Address: "1.2.3.4", Port: 80})
				return err
			},
			"policy status":  func() error { _, err := c.PolicyStatus(ctx, &nodev1.PolicyStatusRequest{Ref: ref}); return err },
			"policy suggest": func() error { _, err := c.PolicySuggest(ctx, &nodev1.PolicySuggestRequest{Ref: ref}); return err },
			"flows": func() error {
				s, err := c.Flows(ctx, &nodev1.FlowsRequest{Ref: ref, Follow: true})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
			"logs": func() error {
				s, err := c.Logs(ctx, &nodev1.LogsRequest{Ref: ref})
				if err == nil {
					_, err = s.Recv()
				}
				return err
			},
			"exec":   func() error { return begin(c.Exec(ctx))(&nodev1.ExecStart{Ref: ref, Command: []string{"true"}}) },
			"attach": func() error { return begin(c.Attach(ctx))(&nodev1.ExecStart{Ref: ref}) },
		} {
			wantCode(n.t, what+", "+name+" "+ref, call(), codes.NotFound)
		}
	}
}

// begin sends the start of an exec or attach stream and answers its end.
func begin(s grpc.BidiStreamingClient[nodev1.ExecRequest, nodev1.ExecResponse], err error) func(*nodev1.ExecStart) error {
	return func(start *nodev1.ExecStart) error {
		if err != nil {
			return err
		}
		if err := s.Send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Start{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for {
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
	}
}

// watched answers the tenants of what a watch shows before it is in step.
func (n *node) watched(c nodev1.NodeClient) (seen []string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	w, err := c.Watch(ctx, &nodev1.WatchRequest{})
	if err != nil {
		n.t.Fatal(err)
	}
	for {
		m, err := w.Recv()
		if err != nil {
			n.t.Fatal(err)
		}
		if m.Synced {
			return seen
		}
		seen = append(seen, m.Sandbox.Spec.Tenant)
	}
}

func importImage(ctx context.Context, c nodev1.NodeClient) error {
	s, err := c.ImportImage(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&nodev1.ImportImageRequest{Chunk: []byte("no archive")}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err = s.CloseAndRecv()
	return err
}

// TestRefusals: the code of what callers get wrong.
func TestRefusals(t *testing.T) {
	n := serve(t)
	c := n.as(os.Geteuid())
	if os.Geteuid() != 0 {
		need.Root(t) // only root may act for every tenant
	}
	ctx := t.Context()
	must[*nodev1.CreateResponse](t)(c.Create(ctx, create("taken", "acme", "sleep 60")))
	edit := func(change func(*sandboxv1.Spec)) error {
		req := create("x", "acme", "exit 0")
		change(req.Spec)
		_, err := c.Create(ctx, req)
		return err
	}
	explain := func(proto, addr string, port uint32) error {
		_, err := c.Explain(ctx, &nodev1.ExplainRequest{Ref: "taken", Protocol: proto, Address: addr, Port: port})
		return err
	}
	for _, x := range []struct {
		what string
		err  error
		want codes.Code
	}{
		{"no spec", func() error { _, err := c.Create(ctx, &nodev1.CreateRequest{}); return err }(), codes.InvalidArgument},
		{"path of a tenant", edit(func(s *sandboxv1.Spec) { s.Tenant = "../x" }), codes.InvalidArgument},
		{"unknown tenant", edit(func(s *sandboxv1.Spec) { s.Tenant = "initech" }), codes.NotFound},
		{"unknown image", edit(func(s *sandboxv1.Spec) { s.Image = "nosuch" }), codes.NotFound},
		{"unknown runtime", edit(func(s *sandboxv1.Spec) { s.RuntimeClass = "gvisor" }), codes.InvalidArgument},
		{"name that is taken", edit(func(s *sandboxv1.Spec) { s.Name = "taken" }), codes.AlreadyExists},
		{"name", edit(func(s *sandboxv1.Spec) { s.Name = "a/b" }), codes.InvalidArgument},
		{"negative memory", edit(func(s *sandboxv1.Spec) { s.Limits = &sandboxv1.Limits{MemoryBytes: -1} }), codes.InvalidArgument},
		{"too much memory", edit(func(s *sandboxv1.Spec) { s.Limits = &sandboxv1.Limits{MemoryBytes: 1 << 60} }), codes.InvalidArgument},
		{"negative lifetime", edit(func(s *sandboxv1.Spec) { s.TtlMs = -5 }), codes.InvalidArgument},
		{"port of the node", edit(publish(65616, 80, "tcp")), codes.InvalidArgument},
		{"port of the sandbox", edit(publish(30080, 65616, "tcp")), codes.InvalidArgument},
		{"port 0", edit(publish(30080, 0, "tcp")), codes.InvalidArgument},
		{"protocol of a port", edit(publish(30080, 80, "sctp")), codes.InvalidArgument},
		{"port that the operator keeps", edit(publish(22, 80, "tcp")), codes.ResourceExhausted},
		{"policy", edit(func(s *sandboxv1.Spec) { s.Policy = "kind: EgressPolicy\nname: x\nrulez: []\n" }), codes.InvalidArgument},
		{"command that is not there", edit(func(s *sandboxv1.Spec) { s.Command = []string{"nosuch"} }), codes.Aborted},
		{"explain no name", explain("tcp", "ex ample.com", 80), codes.InvalidArgument},
		{"explain a mistyped address", explain("tcp", "203.0.113", 80), codes.InvalidArgument},
		{"explain an empty label", explain("tcp", "example..com", 80), codes.InvalidArgument},
		{"explain a ping with a port", explain("icmp", "1.2.3.4", 80), codes.InvalidArgument},
		{"explain a ping", explain("icmp", "1.2.3.4", 0), codes.OK},
		{"explain a name", explain("tcp", "example.com", 80), codes.OK},
		{"explain a zone", explain("tcp", "fe80::1%eth0", 80), codes.InvalidArgument},
		{"explain a protocol", explain("sctp", "1.2.3.4", 80), codes.InvalidArgument},
		{"explain port 0", explain("tcp", "1.2.3.4", 0), codes.InvalidArgument},
		{"explain port 65536", explain("udp", "1.2.3.4", 65536), codes.InvalidArgument},
		{"explain", explain("tcp", "1.2.3.4", 80), codes.OK},
		{"delete of what runs", func() error { _, err := c.Delete(ctx, &nodev1.DeleteRequest{Ref: "taken"}); return err }(), codes.FailedPrecondition},
		{"no reference", func() error { _, err := c.Get(ctx, &nodev1.GetRequest{}); return err }(), codes.InvalidArgument},
		{"archive", importImage(ctx, c), codes.InvalidArgument},
		{"attach without stdin", begin(c.Attach(ctx))(&nodev1.ExecStart{Ref: "taken"}), codes.FailedPrecondition},
		{"exec without a command", begin(c.Exec(ctx))(&nodev1.ExecStart{Ref: "taken"}), codes.InvalidArgument},
		{"exec of what is not there", begin(c.Exec(ctx))(&nodev1.ExecStart{Ref: "taken", Command: []string{"nosuch"}}), codes.InvalidArgument},
		{"stream without a start", noStart(ctx, c), codes.InvalidArgument},
	} {
		wantCode(t, x.what, x.err, x.want)
	}
	must[*nodev1.CreateResponse](t)(c.Create(ctx, create("second", "acme", "sleep 60")))
	must[*nodev1.CreateResponse](t)(c.Create(ctx, create("third", "acme/vision", "sleep 60")))
	_, err := c.Create(ctx, create("fourth", "acme", "sleep 60"))
	wantCode(t, "beyond the quota", err, codes.ResourceExhausted)
	n.reload = fs.ErrPermission
	_, err = c.Reload(ctx, &nodev1.ReloadRequest{})
	if status.Code(err) == codes.OK || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("a reload that is refused: %v", err)
	}
}

func publish(host, port uint32, protocol string) func(*sandboxv1.Spec) {
	return func(s *sandboxv1.Spec) {
		s.Publish = []*sandboxv1.PublishedPort{{Host: host, Port: port, Protocol: protocol}}
	}
}

func noStart(ctx context.Context, c nodev1.NodeClient) error {
	s, err := c.Exec(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&nodev1.ExecRequest{Message: &nodev1.ExecRequest_Stdin{Stdin: []byte("x")}}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err = s.Recv()
	return err
}

// TestLife: one sandbox through the calls, with a watch beside it.
func TestLife(t *testing.T) {
	need.Root(t)
	n := serve(t)
	c := n.as(acme)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	w := must[grpc.ServerStreamingClient[nodev1.WatchResponse]](t)(c.Watch(ctx, &nodev1.WatchRequest{Tenant: "acme"}))
	if m := must[*nodev1.WatchResponse](t)(w.Recv()); !m.Synced {
		t.Fatalf("a watch of nothing begins with %v", m)
	}
	req := create("life", "acme", "echo hello; echo oops >&2; sleep 0.2; printf end; exit 4")
	req.Spec.Env = []string{"A=b"}
	id := must[*nodev1.CreateResponse](t)(c.Create(ctx, req)).Sandbox.Id
	waited := must[*nodev1.WaitResponse](t)(c.Wait(ctx, &nodev1.WaitRequest{Ref: "acme:life"}))
	if x := waited.Sandbox.Exit; x.Code != 4 || x.Reason != sandboxv1.ExitReason_EXIT_REASON_EXITED || waited.Sandbox.State != sandboxv1.State_STATE_STOPPED {
		t.Errorf("waited for %v", waited.Sandbox)
	}
	logs := must[grpc.ServerStreamingClient[nodev1.LogsResponse]](t)(c.Logs(ctx, &nodev1.LogsRequest{Ref: id, Follow: true}))
	var out, errOut string
	for {
		m, err := logs.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if m.Stream == nodev1.Stream_STREAM_STDERR {
			errOut += string(m.Data)
		} else {
			out += string(m.Data)
		}
	}
	if out != "hello\nend" || errOut != "oops\n" {
		t.Errorf("logs: %q and %q", out, errOut)
	}
	got := must[*nodev1.GetResponse](t)(c.Get(ctx, &nodev1.GetRequest{Ref: id}))
	if got.Network != nil || len(got.Events) < 3 || !strings.Contains(got.Policy, "api") {
		t.Errorf("get of a stopped sandbox: %v", got)
	}
	if _, err := c.Delete(ctx, &nodev1.DeleteRequest{Ref: id}); err != nil {
		t.Error(err)
	}
	var states []string
	for {
		m, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case m.Deleted:
			states = append(states, "deleted")
		case m.Sandbox != nil:
			s := strings.ToLower(strings.TrimPrefix(m.Sandbox.State.String(), "STATE_"))
			if len(states) == 0 || states[len(states)-1] != s {
				states = append(states, s)
			}
		}
		if m.Deleted {
			break
		}
	}
	if got, want := strings.Join(states, " "), "admitted placed running stopping stopped deleted"; got != want {
		t.Errorf("watched %q, want %q", got, want)
	}
}

// TestExec: input, output and exit code of one more command.
func TestExec(t *testing.T) {
	need.Root(t)
	n := serve(t)
	c := n.as(acme)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	must[*nodev1.CreateResponse](t)(c.Create(ctx, create("box", "acme", "sleep 60")))
	s := must[grpc.BidiStreamingClient[nodev1.ExecRequest, nodev1.ExecResponse]](t)(c.Exec(ctx))
	for _, m := range []*nodev1.ExecRequest{
		{Message: &nodev1.ExecRequest_Start{Start: &nodev1.ExecStart{Ref: "box", Command: []string{"sh", "-c", "cat; echo oops >&2; exit 7"}, Stdin: true}}},
		{Message: &nodev1.ExecRequest_Stdin{Stdin: []byte("some input")}},
		{Message: &nodev1.ExecRequest_CloseStdin{CloseStdin: true}},
	} {
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	var out, errOut string
	code := int32(-1)
	for code < 0 {
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		switch v := m.Message.(type) {
		case *nodev1.ExecResponse_Stdout:
			out += string(v.Stdout)
		case *nodev1.ExecResponse_Stderr:
			errOut += string(v.Stderr)
		case *nodev1.ExecResponse_ExitCode:
			code = v.ExitCode
		}
	}
	if out != "some input" || errOut != "oops\n" || code != 7 {
		t.Errorf("got %q and %q, code %d", out, errOut, code)
	}
}
