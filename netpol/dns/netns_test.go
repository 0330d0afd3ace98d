// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/test/need"
)

// home is the namespace that the tests run in.
var home, _ = os.Readlink("/proc/self/ns/net")

// space is a network namespace that ends with the test.
type space struct {
	t    testing.TB
	file *os.File
}

// newSpace makes a namespace, by a thread that ends right away.
func newSpace(t testing.TB, loUp bool) *space {
	t.Helper()
	need.Netns(t)
	type answer struct {
		f   *os.File
		err error
	}
	done := make(chan answer)
	go func() {
		runtime.LockOSThread() // and never unlock it
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil && loUp {
			err = loopbackUp()
		}
		var f *os.File
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		done <- answer{f, err}
	}()
	a := <-done
	if a.err != nil {
		t.Fatal(a.err)
	}
	t.Cleanup(func() { a.f.Close() })
	return &space{t, a.f}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

func (s *space) path() string { return fmt.Sprintf("/proc/self/fd/%d", s.file.Fd()) }

// inside runs f on a thread in the namespace, which ends with it.
func (s *space) inside(f func() error) {
	s.t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		s.t.Fatal(err)
	}
}

// dial connects to the resolver from inside.
func (s *space) dial(network string) (conn net.Conn) {
	s.t.Helper()
	s.inside(func() (err error) { conn, err = net.Dial(network, Address); return err })
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

func (s *space) ask(network, name string) *mdns.Msg {
	s.t.Helper()
	conn := &mdns.Conn{Conn: s.dial(network)}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	q := new(mdns.Msg)
	q.SetQuestion(mdns.Fqdn(name), mdns.TypeA)
	q.SetEdns0(1232, false)
	if err := conn.WriteMsg(q); err != nil {
		s.t.Fatal(err)
	}
	m, err := conn.ReadMsg()
	if err != nil {
		s.t.Fatalf("ask %s by %s: %v", name, network, err)
	}
	return m
}

// served is a server with one sandbox in a namespace.
func served(t testing.TB, change func(*Config)) (*Server, *table, *space, Sandbox) {
	t.Helper()
	sp := newSpace(t, true)
	p := compile(t, webRules)
	tb := newTable(p)
	cfg := Config{Dir: filepath.Join(t.TempDir(), "dns"), Table: tb, Upstreams: []string{serveZone(t, newZone(web))}}
	if change != nil {
		change(&cfg)
	}
	srv, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	as := Sandbox{ID: testID, Slot: testSlot, Netns: sp.path(), Program: p}
	if err := srv.Start(context.Background(), as); err != nil {
		t.Fatal(err)
	}
	return srv, tb, sp, as
}

func TestServe(t *testing.T) {
	srv, tb, sp, as := served(t, nil)
	for _, network := range []string{"udp", "tcp"} {
		if got := told(sp.ask(network, "www.example.com")); got != "NOERROR 93.184.216.34" {
			t.Errorf("%s: %s", network, got)
		}
		if got := told(sp.ask(network, "www.example.org")); !strings.HasPrefix(got, "REFUSED") {
			t.Errorf("%s: %s", network, got)
		}
	}
	if got := tb.has(); len(got) != 1 {
		t.Errorf("learned %v", got)
	}
	if s := srv.Stats(testID); s.Queries != 4 || s.Answered != 2 || s.NoRule != 2 || s.ClientBytesOut == 0 {
		t.Errorf("stats %+v", s)
	}
	// Nobody outside the namespace sees the sockets.
	if conn, err := net.Dial("tcp", Address); err == nil {
		conn.Close()
		t.Error("the resolver listens on the host")
	}
	if err := srv.Start(context.Background(), as); err != nil {
		t.Errorf("started again: %v", err)
	}
	if got := told(sp.ask("udp", "www.example.com")); got != "NOERROR 93.184.216.34" {
		t.Errorf("after a second start: %s", got)
	}
	if err := srv.Stop(testID); err != nil {
		t.Fatal(err)
	}
	sp.inside(func() error {
		if conn, err := net.Dial("tcp", Address); err == nil {
			conn.Close()
			t.Error("the socket outlives Stop")
		}
		return nil
	})
	if err := srv.Start(context.Background(), as); err != nil {
		t.Errorf("started after Stop: %v", err)
	}
	if got := told(sp.ask("tcp", "www.example.com")); got != "NOERROR 93.184.216.34" {
		t.Errorf("started after Stop: %s", got)
	}
}

// The thread that opened the sockets is back on the host, or gone.
func TestThreadsComeBack(t *testing.T) {
	need.Netns(t)
	for range 50 {
		s, err := listenIn(newSpace(t, true).path())
		if err != nil {
			t.Fatal(err)
		}
		s.close()
	}
	time.Sleep(50 * time.Millisecond) // the threads of the test's own namespaces end
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		if strings.Contains(task, fmt.Sprintf("/task/%d/", os.Getpid())) {
			continue // the first thread does not end, but sleeps for good, if a test leaves it in a namespace
		}
		if ns, err := os.Readlink(task); err == nil && ns != home {
			t.Errorf("thread %s is in %s, not in %s", task, ns, home)
		}
	}
}

func TestCannotListen(t *testing.T) {
	down := newSpace(t, false)
	p := compile(t, webRules)
	srv, err := Open(Config{Dir: t.TempDir(), Table: newTable(p), Upstreams: []string{serveZone(t, newZone(web))}})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	as := Sandbox{ID: testID, Slot: testSlot, Netns: down.path(), Program: p}
	if err := srv.Start(context.Background(), as); !errors.Is(err, ErrListen) || !strings.Contains(err.Error(), "loopback device is down") {
		t.Errorf("loopback down: %v", err)
	}
	as.Netns = "/proc/self/comm"
	if err := srv.Start(context.Background(), as); !errors.Is(err, ErrListen) {
		t.Errorf("not a namespace: %v", err)
	}
	if err := srv.Stop(testID); err != nil {
		t.Fatal(err)
	}
	// Root in the sandbox holds the port while no agent runs: the policy is
	// kept up to date all the same, and the resolver comes when it is free.
	up := newSpace(t, true)
	as.Netns = up.path()
	for _, network := range []string{"udp", "tcp"} {
		var holder io.Closer
		up.inside(func() (err error) {
			if network == "udp" {
				holder, err = net.ListenPacket("udp4", Address)
			} else {
				holder, err = net.Listen("tcp4", Address)
			}
			return err
		})
		if err := srv.Start(context.Background(), as); !errors.Is(err, ErrListen) || !errors.Is(err, unix.EADDRINUSE) {
			t.Errorf("%s port in use: %v", network, err)
		}
		called := false
		if err := srv.Swap(testID, p, func([]netpol.Learned) error { called = true; return nil }); err != nil || !called {
			t.Errorf("swap without sockets: %v", err)
		}
		holder.Close()
		sb := srv.find(testID)
		sb.relisten(time.Now())
		if sb.socks != nil {
			t.Error("opened again without a pause")
		}
		sb.relisten(time.Now().Add(relistenAfter))
		if got := told(up.ask("udp", "www.example.com")); got != "NOERROR 93.184.216.34" {
			t.Errorf("after the port is free: %s", got)
		}
		// Someone inside destroys the listening socket.
		if raw, err := sb.socks.tcp.SyscallConn(); err != nil {
			t.Fatal(err)
		} else if err := raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) }); err != nil {
			t.Fatal(err)
		}
		for start := time.Now(); !sb.broken.Load(); time.Sleep(time.Millisecond) {
			if time.Since(start) > 5*time.Second {
				t.Fatal("the loss of a socket is not noticed")
			}
		}
		sb.relisten(time.Now().Add(3 * relistenAfter))
		if got := told(up.ask("tcp", "www.example.com")); got != "NOERROR 93.184.216.34" {
			t.Errorf("after the socket was lost: %s", got)
		}
		if err := srv.Stop(testID); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConnections(t *testing.T) {
	srv, _, sp, _ := served(t, func(c *Config) { c.Connections = 2 })
	query := func(conn net.Conn) error {
		q := new(mdns.Msg)
		q.SetQuestion("www.example.com.", mdns.TypeA)
		c := &mdns.Conn{Conn: conn}
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if err := c.WriteMsg(q); err != nil {
			return err
		}
		_, err := c.ReadMsg()
		return err
	}
	a, b := sp.dial("tcp"), sp.dial("tcp")
	for range 3 { // more than one query on a connection
		for _, c := range []net.Conn{a, b} {
			if err := query(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := query(sp.dial("tcp")); err == nil {
		t.Error("a third connection is served")
	}
	a.Close()
	ok := false
	for range 100 {
		if ok = query(sp.dial("tcp")) == nil; ok {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !ok {
		t.Error("no place after a connection was closed")
	}
	// A message that is too long ends the connection before it is read.
	if _, err := b.Write(binary.BigEndian.AppendUint16(nil, maxQuery+1)); err != nil {
		t.Fatal(err)
	}
	b.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after a message that is too long: %v", err)
	}
	if srv.Stats(testID).Dropped == 0 || srv.Stats(testID).Malformed == 0 {
		t.Errorf("stats %+v", srv.Stats(testID))
	}
}

// A sandbox that floods its resolver costs the node no more than its pace.
func TestFlood(t *testing.T) {
	srv, _, sp, _ := served(t, func(c *Config) { c.Rate, c.Burst, c.InFlight = 10, 20, 4 })
	q := new(mdns.Msg)
	q.SetQuestion("www.example.com.", mdns.TypeA)
	raw, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	conn := sp.dial("udp")
	start := time.Now()
	for time.Since(start) < time.Second {
		for range 100 {
			_, _ = conn.Write(raw)
		}
	}
	took := time.Since(start).Seconds()
	s := srv.Stats(testID)
	read := s.Queries + s.Dropped
	if most := uint64(paceFactor * (20 + 10*took)); read > most+2 {
		t.Errorf("read %d messages in %.1fs, want at most %d", read, took, most)
	}
	if s.Answered > uint64(20+10*took)+1 || s.Rate == 0 {
		t.Errorf("stats %+v", s)
	}
}

// Run ends leases and comes back when its context ends.
func TestRun(t *testing.T) {
	srv, tb, sp, _ := served(t, func(c *Config) { c.Floor, c.Cap, c.Idle = time.Second, time.Second, time.Second })
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	sp.ask("udp", "www.example.com")
	if len(tb.has()) != 1 {
		t.Fatal("nothing learned")
	}
	for start := time.Now(); len(tb.has()) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatal("the lease does not end")
		}
	}
	cancel()
	wg.Wait()
}
