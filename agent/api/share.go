// SPDX-License-Identifier: Apache-2.0

package api

import (
	"net"
	"sync"
)

// What one unix user other than root may hold at once. Without bounds one
// tenant could take the agent's descriptors and memory, and with them its
// means to verify that the others are enforced.
const (
	maxConns   = 256
	maxCalls   = 512
	maxWatches = 16 // each has room for thousands of changes
)

// share counts what every user holds. Its zero value is ready.
type share struct {
	mu   sync.Mutex
	held map[uint32]int // +checklocks:mu
}

// take counts one more for uid, or answers false if that would be more than
// most. giveBack may be called again.
func (s *share) take(uid uint32, most int) (giveBack func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if uid != 0 && s.held[uid] >= most {
		return nil, false
	}
	if s.held == nil {
		s.held = map[uint32]int{}
	}
	s.held[uid]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[uid]--; s.held[uid] == 0 {
			delete(s.held, uid)
		}
	}), true
}

// door is a listener that knows who is at the other end of each connection and
// closes those that are too many.
type door struct {
	net.Listener
	conns share
}

// peerConn is a connection of a known caller.
type peerConn struct {
	net.Conn
	who      Caller
	giveBack func()
}

func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if who, err := peerOf(c); err == nil {
			if giveBack, ok := d.conns.take(who.UID, maxConns); ok {
				return &peerConn{Conn: c, who: who, giveBack: giveBack}, nil
			}
		}
		c.Close()
	}
}

func (c *peerConn) Close() error {
	c.giveBack()
	return c.Conn.Close()
}
