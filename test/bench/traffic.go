// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Both ends of every transfer are plain blocking sockets, each on a thread of
// its own, in its namespace and on its CPU.
const (
	streamPort   = 5001
	connectPort  = 5002
	datagramPort = 5003
	echoPort     = 5004
	datagramSize = 64

	// accepting looks this often whether there will be more.
	acceptWait = 50 * time.Millisecond
	// blockLimit ends a send or receive that will never end.
	blockLimit = 5 * time.Second
)

// duplex listens upstream and runs both ends until they are done.
func (p *path) duplex(typ, port int, receive func(listener int) error, send func() error) error {
	var g errgroup.Group
	listens := make(chan error, 1)
	g.Go(func() error {
		return p.end(p.up, runtime.NumCPU()-1, func() (err error) {
			l, err := listen(typ, port)
			listens <- err
			if err != nil {
				return err
			}
			return errors.Join(receive(l), unix.Close(l))
		})
	})
	g.Go(func() error {
		if err := <-listens; err != nil {
			return nil // the receiver says it
		}
		return p.end(p.box, 0, send)
	})
	return g.Wait()
}

// end runs f in a namespace, on one CPU and, where the system lets us, before
// everything else that wants that CPU: what else the machine does is not what
// is measured.
func (p *path) end(ns netns.NsHandle, cpu int, f func() error) error {
	return within(ns, func() error {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("go to CPU %d: %w", cpu, err)
		}
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
		return f()
	})
}

func upEnd(port int) *unix.SockaddrInet4 { return &unix.SockaddrInet4{Port: port, Addr: upAddr.As4()} }

func listen(typ, port int) (int, error) {
	l, err := newSocket(typ, blockLimit)
	if err != nil {
		return -1, err
	}
	err = unix.SetsockoptInt(l, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil {
		err = unix.Bind(l, upEnd(port))
	}
	if err == nil && typ == unix.SOCK_STREAM {
		err = unix.Listen(l, 1024)
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("listen on port %d: %w", port, err), unix.Close(l))
	}
	return l, nil
}

func newSocket(typ int, limit time.Duration) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	tv := unix.NsecToTimeval(limit.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv))
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// dial connects upstream and hands the socket to f.
func dial(typ, port int, f func(fd int) error) error {
	fd, err := newSocket(typ, blockLimit)
	if err != nil {
		return err
	}
	if err = again(func() error { return unix.Connect(fd, upEnd(port)) }); err != nil {
		err = fmt.Errorf("connect to port %d: %w", port, err)
	} else {
		err = f(fd)
	}
	return errors.Join(err, unix.Close(fd))
}

// again repeats a call that a signal has ended; the Go runtime sends some.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// stream answers Gbit/s of payload in one TCP connection out of the sandbox,
// from its first byte to its end.
func (p *path) stream(d time.Duration) (float64, error) {
	var got int
	var took time.Duration
	receive := func(l int) error {
		var c int
		if err := again(func() (err error) { c, _, err = unix.Accept(l); return err }); err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		buf := make([]byte, 256<<10)
		began := time.Now()
		for n := -1; n != 0; got += n {
			if err := again(func() (err error) { n, err = unix.Read(c, buf); return err }); err != nil {
				return errors.Join(fmt.Errorf("receive: %w", err), unix.Close(c))
			}
		}
		took = time.Since(began)
		return unix.Close(c)
	}
	err := p.duplex(unix.SOCK_STREAM, streamPort, receive, func() error {
		return dial(unix.SOCK_STREAM, streamPort, func(fd int) error {
			buf := make([]byte, 128<<10)
			for end := time.Now().Add(d); time.Now().Before(end); {
				if err := again(func() error { _, err := unix.Write(fd, buf); return err }); err != nil {
					return fmt.Errorf("send: %w", err)
				}
			}
			return nil
		})
	})
	if p.attached {
		p.sent += uint64(got)
	}
	return float64(got) * 8 / 1e9 / max(took, time.Nanosecond).Seconds(), err
}

// connects answers TCP connections a second, made and reset one after the
// other.
func (p *path) connects(d time.Duration) (float64, error) {
	made := 0
	var took time.Duration
	var over atomic.Bool
	receive := func(l int) error {
		tv := unix.NsecToTimeval(acceptWait.Nanoseconds())
		if err := unix.SetsockoptTimeval(l, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		for {
			c, _, err := unix.Accept(l)
			switch {
			case err == nil:
				if err := unix.Close(c); err != nil {
					return err
				}
			case errors.Is(err, unix.EAGAIN):
				if over.Load() {
					return nil
				}
			case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNABORTED):
				return fmt.Errorf("accept: %w", err)
			}
		}
	}
	err := p.duplex(unix.SOCK_STREAM, connectPort, receive, func() error {
		defer over.Store(true)
		began := time.Now()
		for ; time.Since(began) < d; made++ {
			err := dial(unix.SOCK_STREAM, connectPort, func(fd int) error {
				// Close with a reset: no port is held afterwards.
				return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			})
			if err != nil {
				return err
			}
		}
		took = time.Since(began)
		return nil
	})
	return float64(made) / max(took, time.Nanosecond).Seconds(), err
}

// datagrams answers small packets a second that one sender puts through the
// path. The kernel carries each to the receiver's socket within the send; what
// does not fit into its buffer is lost there, behind all that is measured.
func (p *path) datagrams(d time.Duration) (float64, error) {
	sent := 0
	var took time.Duration
	done := make(chan struct{})
	err := p.duplex(unix.SOCK_DGRAM, datagramPort, func(int) error { <-done; return nil }, func() error {
		defer close(done)
		return dial(unix.SOCK_DGRAM, datagramPort, func(fd int) error {
			buf := make([]byte, datagramSize)
			began := time.Now()
			for ; sent%64 != 0 || time.Since(began) < d; sent++ {
				if err := again(func() error { _, err := unix.Write(fd, buf); return err }); err != nil {
					return fmt.Errorf("send: %w", err)
				}
			}
			took = time.Since(began)
			return nil
		})
	})
	if p.attached {
		p.sent += uint64(sent * datagramSize)
	}
	return float64(sent) / max(took, time.Nanosecond).Seconds(), err
}

// roundTrips answers how often a second one byte went there and back on one
// connection.
func (p *path) roundTrips(d time.Duration) (float64, error) {
	made := 0
	var took time.Duration
	nodelay := func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) }
	receive := func(l int) error {
		var c int
		if err := again(func() (err error) { c, _, err = unix.Accept(l); return err }); err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		buf := make([]byte, 1)
		err := nodelay(c)
		for n := 1; err == nil && n != 0; {
			if err = again(func() (err error) { n, err = unix.Read(c, buf); return err }); err == nil && n > 0 {
				err = again(func() error { _, err := unix.Write(c, buf); return err })
			}
		}
		return errors.Join(err, unix.Close(c))
	}
	err := p.duplex(unix.SOCK_STREAM, echoPort, receive, func() error {
		return dial(unix.SOCK_STREAM, echoPort, func(fd int) error {
			if err := nodelay(fd); err != nil {
				return err
			}
			buf := make([]byte, 1)
			began := time.Now()
			for ; time.Since(began) < d; made++ {
				err := again(func() error { _, err := unix.Write(fd, buf); return err })
				if err == nil {
					err = again(func() error { _, err := unix.Read(fd, buf); return err })
				}
				if err != nil {
					return fmt.Errorf("round trip: %w", err)
				}
			}
			took = time.Since(began)
			return nil
		})
	})
	if p.attached {
		p.sent += uint64(made)
	}
	return float64(made) / max(took, time.Nanosecond).Seconds(), err
}
