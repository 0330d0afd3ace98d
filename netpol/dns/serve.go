// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Faster than this the messages of a sandbox are not even read: what it
	// sends beyond that is dropped by the kernel, in its own time.
	paceFactor = 8

	tcpIdle  = 10 * time.Second // for the next whole query of a connection
	tcpWrite = 5 * time.Second
	tcpMost  = 5 * time.Minute // of a connection in all

	rcvBuffer = 128 << 10
)

// queryBuffers hold one client's message and one more byte, by which a longer
// one is known.
var queryBuffers = sync.Pool{New: func() any { return new([maxQuery + 1]byte) }}

// paced waits until the next message may be read; false if the sandbox ends.
func (sb *sandbox) paced() bool {
	rate := sb.cfg.Rate * paceFactor
	for {
		if ok, _ := sb.pace.take(time.Now(), rate, sb.cfg.Burst*paceFactor); ok {
			return sb.ctx.Err() == nil
		}
		if !sb.pause(time.Duration(float64(time.Second) / rate)) {
			return false
		}
	}
}

// pause sleeps; false if the sandbox ends.
func (sb *sandbox) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-sb.ctx.Done():
		return false
	}
}

// begin takes one of the places for queries in flight.
func (sb *sandbox) begin() bool {
	if sb.inFlight.Add(1) > int64(sb.cfg.InFlight) {
		sb.inFlight.Add(-1)
		sb.n.dropped.Add(1)
		return false
	}
	return true
}

func (sb *sandbox) done() { sb.inFlight.Add(-1) }

// lost says that a socket is of no use any more, if the sandbox goes on.
func (sb *sandbox) lost(err error) {
	if sb.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
		sb.cfg.Log.Warn("a socket of the resolver is lost", "sandbox", sb.id, "err", err)
		sb.broken.Store(true)
	}
}

// serveUDP reads until the socket is closed or fails.
func (sb *sandbox) serveUDP(conn *net.UDPConn) {
	_ = conn.SetReadBuffer(rcvBuffer) // a smaller one drops earlier
	var queries sync.WaitGroup
	defer queries.Wait()
	for sb.paced() {
		buf := queryBuffers.Get().(*[maxQuery + 1]byte)
		n, from, err := conn.ReadFromUDPAddrPort(buf[:])
		if err != nil {
			queryBuffers.Put(buf)
			sb.lost(err)
			return
		}
		if !sb.begin() {
			queryBuffers.Put(buf)
			continue
		}
		queries.Go(func() {
			defer sb.done()
			defer queryBuffers.Put(buf)
			if out := sb.handle(buf[:n], true); out != nil {
				sb.n.clientOut.Add(uint64(len(out)))
				// A client that is gone does not get its answer.
				_, _ = conn.WriteToUDPAddrPort(out, from)
			}
		})
	}
}

// serveTCP accepts until the listener is closed or fails.
func (sb *sandbox) serveTCP(l *net.TCPListener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	var open atomic.Int64
	for sb.paced() {
		conn, err := l.AcceptTCP()
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOBUFS) {
			if !sb.pause(100 * time.Millisecond) {
				return
			}
			continue
		}
		if err != nil {
			sb.lost(err)
			return
		}
		if open.Add(1) > int64(sb.cfg.Connections) {
			open.Add(-1)
			sb.n.dropped.Add(1)
			_ = conn.Close()
			continue
		}
		conns.Go(func() {
			defer open.Add(-1)
			defer conn.Close()
			sb.serveConn(conn)
		})
	}
}

// serveConn answers the queries of a connection, one after the other.
func (sb *sandbox) serveConn(conn *net.TCPConn) {
	defer stopWith(sb.ctx, conn)()
	buf := queryBuffers.Get().(*[maxQuery + 1]byte)
	defer queryBuffers.Put(buf)
	for end := time.Now().Add(tcpMost); time.Now().Before(end) && sb.paced(); {
		_ = conn.SetReadDeadline(time.Now().Add(tcpIdle))
		if sb.ctx.Err() != nil {
			return // else its end may have come before the deadline was set
		}
		if _, err := io.ReadFull(conn, buf[:2]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(buf[:2]))
		if n > maxQuery {
			sb.n.queries.Add(1)
			sb.n.malformed.Add(1)
			return
		}
		if _, err := io.ReadFull(conn, buf[:n]); err != nil {
			return
		}
		if !sb.begin() {
			return
		}
		out := sb.handle(buf[:n], false)
		sb.done()
		if out == nil {
			return
		}
		sb.n.clientOut.Add(uint64(len(out)) + 2)
		_ = conn.SetWriteDeadline(time.Now().Add(tcpWrite))
		if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)); err != nil {
			return
		}
	}
}
