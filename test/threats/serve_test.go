// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/vishvananda/netns"
)

// serve accepts TCP connections at an address of the internet and hands each
// to f until the test ends.
func serve(t testing.TB, n *node, at netip.AddrPort, f func(io.ReadWriter)) {
	t.Helper()
	serveIn(t, n.far, at, f)
}

func serveIn(t testing.TB, ns netns.NsHandle, at netip.AddrPort, f func(io.ReadWriter)) netip.AddrPort {
	t.Helper()
	network := "tcp4"
	if at.Addr().Is6() {
		network = "tcp6"
	}
	var l *net.TCPListener
	must(t, in(ns, func() (err error) {
		l, err = net.ListenTCP(network, net.TCPAddrFromAddrPort(at))
		return err
	}))
	var all sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			all.Go(func() {
				f(c)
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}
