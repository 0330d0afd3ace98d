// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/agent/config"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/spool"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/agent/supervisor/supervisortest"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
	"github.com/bulkheadhq/bulkhead/netpol/link"
	"github.com/bulkheadhq/bulkhead/tenant"
	"github.com/bulkheadhq/bulkhead/test/need"
)

const envInside = "BULKHEAD_AGENT_TEST_NS" // set in the process that owns the tests' namespaces

// TestMain runs the tests again in a network and a mount namespace of their
// own. They are the host of every test, and nothing outlives the process.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	if os.Getenv(envInside) == "" {
		os.Exit(runInside())
	}
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), loopbackUp()); err != nil {
		fmt.Fprintln(os.Stderr, "prepare the tests' namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func runInside() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "run tests in their own namespaces:", err)
		return 1
	}
	return 0
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// The name that the tests' tenant may use, and where it leads.
const models = "models.example.com"

var modelsAddr = netip.MustParseAddr("198.51.100.7")

// site is the host of a test: its disk, its upstream resolver, a runtime that
// only pretends, and at most one agent whose links, programs, names and budgets
// are real.
type site struct {
	t        testing.TB
	dir      string
	upstream string
	machine  *supervisortest.Machine
	tenants  *tenant.Set

	n      *node
	cancel context.CancelFunc
	group  *errgroup.Group
}

func newSite(t testing.TB, sandboxes int64) *site {
	t.Helper()
	need.BPF(t)
	need.Netns(t)
	s := &site{t: t, dir: t.TempDir(), machine: supervisortest.NewMachine(), upstream: upstream(t)}
	s.tenants = s.policy(sandboxes, "5001")
	t.Cleanup(func() {
		if s.n != nil {
			s.leave()
		}
		s.purge()
	})
	return s
}

// policy is a tenant that may use one name, send to one port, and has budgets.
func (s *site) policy(sandboxes int64, port string) *tenant.Set {
	s.t.Helper()
	p, err := netpol.Parse("acme.yaml", []byte(`kind: EgressPolicy
name: acme
rules:
- {name: models, action: allow, to: [{fqdn: `+models+`}], ports: [443/tcp]}
- {name: bulk, action: allow, to: [{cidr: 203.0.113.0/24}], ports: [`+port+`/tcp]}
budget:
- {scope: tenant, egress: 1GiB, per: day, then: block}
- {scope: sandbox, egress: 1MiB, per: hour, then: block}
`))
	if err != nil {
		s.t.Fatal(err)
	}
	set, err := tenant.NewSet(tenant.Tenant{Path: "acme", File: "acme.yaml", Policy: &p, Quota: tenant.Quota{Sandboxes: sandboxes}})
	if err != nil {
		s.t.Fatal(err)
	}
	return set
}

// upstream answers every question for an address with modelsAddr.
func upstream(t testing.TB) string {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return // closed
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
					Body:   &dnsmessage.AResource{A: modelsAddr.As4()},
				}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = c.WriteTo(out, from) // the resolver asks again
			}
		}
	}()
	return c.LocalAddr().String()
}

// start lets an agent run, wired as Run wires it.
func (s *site) start() {
	s.t.Helper()
	check := func(err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	n := &node{opts: Options{Log: slog.New(slog.DiscardHandler)}, cfg: config.Default()}
	s.n = n
	n.cfg.RunDir = filepath.Join(s.dir, "run")
	n.cfg.DNS.Upstreams = []string{s.upstream}
	var err error
	n.store, err = store.Open(filepath.Join(s.dir, "bulkhead.db"))
	check(err)
	n.spool, err = spool.Open(spool.Config{Dir: filepath.Join(s.dir, "spool"), NodeID: supervisortest.NodeID, LimitBytes: 1 << 30})
	check(err)
	n.links, err = link.Open(link.Config{
		Pool4: n.cfg.Network.Pool4, Pool6: n.cfg.Network.Pool6, NetnsDir: filepath.Join(s.dir, "netns"), Table: n.cfg.Network.NFTable,
	})
	check(err)
	n.egress, err = enforce.Open(enforce.Config{
		PinDir: filepath.Join(s.dir, "bpf"), MaxSandboxes: 256, Pools: []netip.Prefix{n.cfg.Network.Pool4, n.cfg.Network.Pool6},
	})
	check(err)
	check(n.openNetwork())
	cfg := s.machine.Process(n.store).Config(s.dir, s.tenants, n.spool)
	cfg.Links, cfg.Names, cfg.Budgets, cfg.Egress = links{n.links}, names{n.names}, n.budgets, egress{n.egress}
	cfg.Log, cfg.BootTime, cfg.Interval = n.opts.Log, bootTime, n.cfg.Usage.Interval.Duration
	n.sup, err = supervisor.New(cfg)
	check(err)
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.group, ctx = errgroup.WithContext(ctx)
	ready := make(chan struct{})
	s.group.Go(func() error { return n.sup.Run(ctx, ready) })
	n.runNetwork(ctx, s.group)
	<-ready
}

func (s *site) leave() {
	s.t.Helper()
	s.cancel()
	if err := s.group.Wait(); err != nil {
		s.t.Error(err)
	}
	if err := s.n.close(); err != nil {
		s.t.Error(err)
	}
	s.n = nil
}

// purge takes away what agents leave on purpose.
func (s *site) purge() {
	pins := filepath.Join(s.dir, "bpf")
	_ = os.RemoveAll(filepath.Join(pins, "v1")) // there are others' versions of it
	entries, _ := os.ReadDir(pins)
	for _, e := range entries {
		_ = os.RemoveAll(filepath.Join(pins, e.Name()))
	}
	_ = unix.Unmount(pins, unix.MNT_DETACH)
	files, _ := filepath.Glob(filepath.Join(s.dir, "netns", "*"))
	for _, f := range files {
		_ = unix.Unmount(f, unix.MNT_DETACH)
	}
}

// run starts sandboxes and waits until all of them run.
func (s *site) run(specs ...sandbox.Spec) []sandbox.Record {
	s.t.Helper()
	recs := make([]sandbox.Record, len(specs))
	var group errgroup.Group
	for i, spec := range specs {
		group.Go(func() error {
			rec, err := s.n.sup.Create(s.t.Context(), spec, "uid:0")
			if err == nil {
				rec, err = s.n.sup.Launched(s.t.Context(), rec.ID)
			}
			if err == nil && rec.State != sandbox.Running {
				err = fmt.Errorf("%s is %s: %+v", spec.Name, rec.State, rec.Exit)
			}
			recs[i] = rec
			return err
		})
	}
	if err := group.Wait(); err != nil {
		s.t.Fatal(err)
	}
	return recs
}

func (s *site) stop(recs ...sandbox.Record) {
	s.t.Helper()
	var group errgroup.Group
	for _, rec := range recs {
		group.Go(func() error {
			err := s.n.sup.Stop(rec.ID, sandbox.StopRequest{Reason: sandbox.StoppedBy, By: "uid:0", Grace: -1})
			if err == nil {
				_, err = s.n.sup.Wait(s.t.Context(), rec.ID)
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		s.t.Fatal(err)
	}
}

func spec(name string, ports ...sandbox.Port) sandbox.Spec {
	return sandbox.Spec{Name: name, Tenant: "acme", Image: supervisortest.Image, Command: []string{"sh", "-c", "sleep 1000"}, Publish: ports}
}

// inside calls f in a sandbox's network namespace.
func inside(rec sandbox.Record, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := os.Open(rec.Plan.NetnsPath)
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// ask asks the resolver of a sandbox and answers what it says.
func ask(rec sandbox.Record, name string) (code dnsmessage.RCode, addrs []netip.Addr, err error) {
	err = inside(rec, func() error {
		c, err := net.Dial("udp4", "127.0.0.53:53")
		if err != nil {
			return err
		}
		defer c.Close()
		q := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: 7, RecursionDesired: true},
			Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name + "."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		}
		out, err := q.Pack()
		if err != nil {
			return err
		}
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := c.Write(out); err != nil {
			return err
		}
		buf := make([]byte, 2048)
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		var m dnsmessage.Message
		if err := m.Unpack(buf[:n]); err != nil {
			return err
		}
		code = m.RCode
		for _, a := range m.Answers {
			if r, ok := a.Body.(*dnsmessage.AResource); ok {
				addrs = append(addrs, netip.AddrFrom4(r.A))
			}
		}
		return nil
	})
	return code, addrs, err
}

// checkOpen asserts what the kernel does with a flow to the name's address.
func (s *site) checkOpen(rec sandbox.Record, want bool) {
	s.t.Helper()
	x, err := s.n.egress.Explain(rec.Slot, netpol.Flow{Proto: netpol.TCP, Dst: modelsAddr, Port: 443})
	if err != nil || x.Allowed != want {
		s.t.Errorf("%s: the name's address is open: %t (%s), want %t; %v", rec.Spec.Name, x.Allowed, x.Detail, want, err)
	}
}

func (s *site) checkBulk(rec sandbox.Record, port uint16, want bool) {
	s.t.Helper()
	x, err := s.n.egress.Explain(rec.Slot, netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("203.0.113.9"), Port: port})
	if err != nil || x.Allowed != want {
		s.t.Errorf("%s: port %d is open: %t (%s), want %t; %v", rec.Spec.Name, port, x.Allowed, x.Detail, want, err)
	}
}

// TestDatapath: a life of a sandbox with its real network, through a restart of
// the agent and a change of policy.
func TestDatapath(t *testing.T) {
	s := newSite(t, 10)
	s.start()
	published := sandbox.Port{Host: 30001, Sandbox: 80, Proto: netpol.TCP}
	recs := s.run(spec("a", published), spec("b"))
	a, b := recs[0], recs[1]
	s.checkOpen(a, false)
	if code, _, err := ask(a, "other.example.com"); err != nil || code != dnsmessage.RCodeRefused && code != dnsmessage.RCodeNameError {
		t.Errorf("a name that no rule allows: %s, %v", code, err)
	}
	resolve := func() {
		t.Helper()
		code, addrs, err := ask(a, models)
		if err != nil || code != dnsmessage.RCodeSuccess || !slices.Contains(addrs, modelsAddr) {
			t.Fatalf("%s: %s, %v, %v", models, code, addrs, err)
		}
		s.checkOpen(a, true)
	}
	resolve()
	s.checkOpen(b, false)
	budgets := func() string {
		t.Helper()
		all, err := s.n.egress.Budgets()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, x := range all {
			out = append(out, fmt.Sprintf("%s/%d=%d", x.Tenant, x.Slot, x.Limit))
		}
		return strings.Join(out, " ")
	}
	const want = "acme/0=1073741824 acme/1=1048576 acme/2=1048576"
	if got := budgets(); got != want {
		t.Errorf("budgets %q, want %q", got, want)
	}
	ports, err := s.n.links.Published()
	if err != nil || len(ports) != 1 || len(ports[a.ID]) != 1 || ports[a.ID][0] != (link.Port{Host: 30001, Sandbox: 80, Proto: 6}) {
		t.Errorf("published: %v, %v", ports, err)
	}
	if _, err := s.n.links.Capped(a.ID); err != nil {
		t.Error(err)
	}

	s.leave()
	s.start()
	waitFor(t, func() bool { at, _ := s.n.sup.Enforced(a.ID); return !at.IsZero() })
	s.checkOpen(a, true)
	resolve()
	if got := budgets(); got != want {
		t.Errorf("after a restart budgets are %q, want %q", got, want)
	}

	if n, err := s.n.sup.Reload(t.Context(), s.policy(10, "5002")); err != nil || n != 2 {
		t.Fatalf("reload: %d, %v", n, err)
	}
	s.checkOpen(a, true)
	for _, rec := range recs {
		s.checkBulk(rec, 5001, false)
		s.checkBulk(rec, 5002, true)
	}
	resolve()

	// A hand that flushes the firewall: all is back within two rounds.
	if err := s.n.links.Purge(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return strings.HasSuffix(s.events(a.ID), "drift repaired") })
	if err := s.n.links.VerifyTable(); err != nil {
		t.Error(err)
	}
	if ports, err := s.n.links.Published(); err != nil || len(ports[a.ID]) != 1 {
		t.Errorf("published after a repair: %v, %v", ports, err)
	}

	s.stop(a, b)
	if ids, err := s.n.links.List(); err != nil || len(ids) != 0 {
		t.Errorf("links are left: %v, %v", ids, err)
	}
	if ids, err := s.n.egress.List(); err != nil || len(ids) != 0 {
		t.Errorf("programs are left: %v, %v", ids, err)
	}
	if files, _ := filepath.Glob(filepath.Join(s.n.cfg.RunDir, "dns", "*")); len(files) != 0 {
		t.Errorf("journals are left: %v", files)
	}
	if ports, err := s.n.links.Published(); err != nil || len(ports) != 0 {
		t.Errorf("ports are left: %v, %v", ports, err)
	}
}

func (s *site) events(id string) string {
	var kinds []string
	for _, rec := range s.n.sup.List() {
		if rec.ID == id {
			for _, e := range rec.Events {
				kinds = append(kinds, e.Kind)
			}
		}
	}
	return strings.Join(kinds, " ")
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for range 400 {
		if done() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("it does not come about")
}

// BenchmarkReload100 changes the policy of 100 running sandboxes of one tenant:
// real store, spool, programs, resolvers. Between two changes the kernel's
// spare maps are made again, as they are between two of an operator's.
func BenchmarkReload100(b *testing.B) {
	s := newSite(b, 0)
	s.start()
	specs := make([]sandbox.Spec, 100)
	for i := range specs {
		specs[i] = spec(fmt.Sprintf("s%d", i))
	}
	recs := s.run(specs...)
	sets := []*tenant.Set{s.policy(0, "5002"), s.policy(0, "5001")}
	i := 0
	var worst time.Duration
	for b.Loop() {
		began := time.Now()
		if n, err := s.n.sup.Reload(b.Context(), sets[i%2]); err != nil || n != 100 {
			b.Fatalf("%d updated, %v", n, err)
		}
		worst = max(worst, time.Since(began))
		i++
		b.StopTimer()
		time.Sleep(time.Second)
		b.StartTimer()
	}
	b.ReportMetric(float64(worst.Microseconds())/1000, "ms-worst")
	s.checkBulk(recs[99], uint16(5001+i%2), true)
	s.stop(recs...)
}
