// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// sockets are where one sandbox asks.
type sockets struct {
	udp *net.UDPConn
	tcp *net.TCPListener
}

func (s *sockets) close() {
	_ = s.udp.Close()
	_ = s.tcp.Close()
}

// listenIn opens the sockets in the network namespace at path.
func listenIn(path string) (*sockets, error) {
	ns, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open netns: %w", err)
	}
	defer ns.Close()
	type answer struct {
		s   *sockets
		err error
	}
	done := make(chan answer, 1) // one answer; never closed
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- answer{err: fmt.Errorf("open own netns: %w", err)}
			return
		}
		defer home.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			done <- answer{err: fmt.Errorf("enter netns %s: %w", path, err)}
			return
		}
		s, err := listenHere()
		// A thread that does not get home ends with this goroutine.
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- answer{s, err}
	}()
	a := <-done
	return a.s, a.err
}

// listenHere opens the sockets in the namespace of the calling thread, which
// is locked.
func listenHere() (*sockets, error) {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return nil, fmt.Errorf("look at the loopback device: %w", err)
	}
	if lo.Flags&net.FlagUp == 0 {
		return nil, errors.New("the loopback device is down: who makes the network namespace must bring it up")
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	pc, err := lc.ListenPacket(context.Background(), "udp4", Address)
	if err != nil {
		return nil, fmt.Errorf("%s (does something in the sandbox use the port?): %w", Address, err)
	}
	l, err := lc.Listen(context.Background(), "tcp4", Address)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s (does something in the sandbox use the port?): %w", Address, err), pc.Close())
	}
	return &sockets{udp: pc.(*net.UDPConn), tcp: l.(*net.TCPListener)}, nil
}
