// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the internet's hosts.
var (
	API4       = netip.MustParseAddr("203.0.113.10") // the API host
	API6       = netip.MustParseAddr("2001:db8:113::10")
	Forbidden4 = netip.MustParseAddr("198.51.100.7") // a host that nobody may reach
	Forbidden6 = netip.MustParseAddr("2001:db8:51::7")
	Metadata4  = netip.MustParseAddr("169.254.169.254")
)

type hostSpec struct {
	name     string
	addrs    []string // of the host, with the network that it sees
	gateways []string // of our side of the link
}

// hosts of the internet. This machine gets a route to each host alone and not
// to its network: something real may live in these documentation networks.
var hosts = []hostSpec{
	{"api", []string{"203.0.113.10/24", "2001:db8:113::10/64"}, []string{"203.0.113.1/32", "2001:db8:113::1/128"}},
	{"far", []string{"198.51.100.7/24", "2001:db8:51::7/64"}, []string{"198.51.100.1/32", "2001:db8:51::1/128"}},
	{"meta", []string{"169.254.169.254/30"}, []string{"169.254.169.253/32"}},
}

// HostLink names this machine's side of the link of a host of the internet: api,
// far or meta.
func HostLink(name string) string { return "inet-bt-" + name }

// FromSandboxes says whether an address may be a sandbox's: of the pools, or
// this machine's own, behind which sandboxes hide. It is for a capture on the
// link of a host that nothing else talks to.
func FromSandboxes(a netip.Addr) bool {
	for _, h := range hosts {
		for _, g := range h.gateways {
			if netip.MustParsePrefix(g).Addr() == a {
				return true
			}
		}
	}
	return netip.MustParsePrefix(Pool4).Contains(a) || netip.MustParsePrefix(Pool6).Contains(a)
}

// Internet is three hosts in network namespaces of this process.
type Internet struct {
	servers []io.Closer
	links   []string
	nets    []*os.File // namespaces, held open

	// Received counts payload bytes that the API host's sink has read.
	Received atomic.Int64
	// Requests counts HTTP requests by host name.
	mu       sync.Mutex
	requests map[string]int
	conns    map[net.Conn]bool // open: a sandbox that was cut off never ends its own
	wg       sync.WaitGroup
}

// Requests answers how many HTTP requests and connections a host has seen.
func (n *Internet) Requests(host string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.requests[host]
}

func (n *Internet) count(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests[host]++
}

// openInternet makes the hosts and starts their servers: HTTP on port 80 of
// every host, a sink on port 5001 of api and far, a source on port 5002 of api
// that sends as many bytes as it is asked for in one line, and the resolver of
// names.go.
func openInternet() (*Internet, error) {
	n := &Internet{requests: map[string]int{}, conns: map[net.Conn]bool{}}
	for _, h := range hosts {
		if err := n.addHost(h); err != nil {
			return nil, errors.Join(fmt.Errorf("host %s: %w", h.name, err), n.Close())
		}
	}
	return n, nil
}

func (n *Internet) addHost(h hostSpec) error {
	ns, err := newNetns()
	if err != nil {
		return err
	}
	n.nets = append(n.nets, ns)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: HostLink(h.name), MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("add link: %w", err)
	}
	n.links = append(n.links, HostLink(h.name))
	if err := configure(nil, HostLink(h.name), h.gateways); err != nil {
		return err
	}
	if err := routeTo(HostLink(h.name), h.addrs); err != nil {
		return err
	}
	return inNetns(ns, func() error {
		hn, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer hn.Close()
		if err := configure(hn, "lo", nil); err != nil {
			return err
		}
		if err := configure(hn, "eth0", h.addrs); err != nil {
			return err
		}
		eth, err := hn.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, g := range h.gateways {
			addr, _, err := net.ParseCIDR(g)
			if err != nil {
				return err
			}
			if err := hn.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: addr}); err != nil {
				return fmt.Errorf("default route: %w", err)
			}
		}
		return n.serve(h)
	})
}

// routeTo adds a route to each address alone.
func routeTo(name string, addrs []string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		ip, _, err := net.ParseCIDR(a)
		if err != nil {
			return err
		}
		bits := 8 * len(ip)
		if v4 := ip.To4(); v4 != nil {
			ip, bits = v4, 32
		}
		dst := &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("route to %s: %w", a, err)
		}
	}
	return nil
}

// configure gives a link its addresses and brings it up. A nil handle is this
// namespace.
func configure(h *netlink.Handle, name string, addrs []string) error {
	if h == nil {
		var err error
		if h, err = netlink.NewHandle(); err != nil {
			return err
		}
		defer h.Close()
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	return h.LinkSetUp(link)
}

// serve starts the servers of a host; called inside its namespace, where the
// sockets then stay.
func (n *Internet) serve(h hostSpec) error {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, req *http.Request) {
		n.count(h.name)
		got, _ := io.Copy(io.Discard, http.MaxBytesReader(w, req.Body, 1<<30))
		n.Received.Add(got)
		fmt.Fprintf(w, "%s says hello, %d bytes received\n", h.name, got)
	})
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	n.servers = append(n.servers, srv)
	n.wg.Go(func() { _ = srv.Serve(l) }) // ends with Close
	if h.name == "meta" {
		return nil
	}
	if h.name == "api" {
		if err := n.answerNames(); err != nil {
			return err
		}
	}
	if err := n.listen(h.name, ":5001", func(c net.Conn) {
		buf := make([]byte, 256<<10)
		for {
			k, err := c.Read(buf)
			n.Received.Add(int64(k))
			if err != nil {
				return
			}
		}
	}); err != nil {
		return err
	}
	return n.listen(h.name, ":5002", func(c net.Conn) {
		var want int64
		if _, err := fmt.Fscanln(c, &want); err == nil {
			_, _ = io.CopyN(c, zeros{}, want)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func (n *Internet) listen(host, addr string, handle func(net.Conn)) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	n.servers = append(n.servers, l)
	n.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.count(host)
			n.hold(c, true)
			n.wg.Go(func() {
				defer n.hold(c, false)
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
				handle(c)
			})
		}
	})
	return nil
}

// hold notes whether a connection is open.
func (n *Internet) hold(c net.Conn, open bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if open {
		n.conns[c] = true
	} else {
		delete(n.conns, c)
	}
}

// Inside runs f in the namespace of a host, on a thread of its own.
func (n *Internet) Inside(host string, f func() error) error {
	for i, h := range hosts {
		if h.name == host {
			return inNetns(n.nets[i], f)
		}
	}
	return fmt.Errorf("no host %s", host)
}

// Close ends the servers and removes the hosts.
func (n *Internet) Close() error {
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, s := range n.servers {
		if srv, ok := s.(*http.Server); ok {
			_ = srv.Shutdown(ctx)
		}
		_ = s.Close()
	}
	n.mu.Lock()
	for c := range n.conns {
		_ = c.Close() // its handler ends
	}
	n.mu.Unlock()
	for _, l := range n.links {
		errs = append(errs, removeLink(l))
	}
	for _, ns := range n.nets {
		errs = append(errs, ns.Close())
	}
	n.wg.Wait()
	return errors.Join(errs...)
}

func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			return nil
		}
		return err
	}
	return netlink.LinkDel(link)
}

// newNetns makes a namespace that lives as long as the file is open or
// something is in it.
func newNetns() (*os.File, error) {
	var ns *os.File
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		ns, err = os.Open(filepath.Join("/proc/self/task", strconv.Itoa(unix.Gettid()), "ns/net"))
		return err
	})
	return ns, err
}

func inNetns(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// onThread runs f on a thread that is thrown away, so that whatever namespace
// it ended in is nobody else's.
func onThread(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		errs <- f()
	}()
	return <-errs
}
