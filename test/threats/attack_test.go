// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// attack is something that a box sends, and the reason that it is dropped for.
type attack struct {
	name   string
	reason string // of the drop counter
	frames func(b *box, k token) [][]byte
	// inert: no Linux host passes it on, so there is nothing to be seen of it
	// without a filter either. It is judged all the same.
	inert bool
}

// one is the frames of an attack that sends one packet. The token is appended
// to its payload.
func one(p packet) func(b *box, k token) [][]byte {
	return func(b *box, k token) [][]byte {
		p := p
		if p.l4 != nil {
			p.l4 = append(append([]byte{}, p.l4...), k[:]...)
		} else {
			p.payload = append(append([]byte{}, p.payload...), k[:]...)
		}
		return [][]byte{p.from(b)}
	}
}

// send sends frames as they are.
func (b *box) send(t testing.TB, frames ...[]byte) {
	t.Helper()
	for _, f := range frames {
		if err := unix.Sendto(b.raw, f, 0, &unix.SockaddrLinklayer{Ifindex: b.inside, Halen: 6}); err != nil {
			t.Fatalf("send %d bytes from %s: %v", len(f), b, err)
		}
	}
}

// pass sends an honest packet and waits for it: what the sandbox sent before
// has arrived, or never will.
func (b *box) pass(t testing.TB) {
	t.Helper()
	k := newToken()
	b.node.await(k)
	defer b.node.forget(k)
	b.send(t, one(packet{dst: far4, port: fencePort})(b, k)...)
	if b.node.waitFor(k, 1, patience) == 0 {
		t.Fatalf("an honest packet of %s did not arrive; drops %v", b, b.drops(t))
	}
	time.Sleep(settle)
}

// control makes the attack from the open box. It must arrive.
func (n *node) control(t testing.TB, a attack) {
	t.Helper()
	k := newToken()
	n.await(k)
	defer n.forget(k)
	n.open.send(t, a.frames(n.open, k)...)
	if a.inert {
		return
	}
	if n.waitFor(k, 1, patience) == 0 {
		t.Errorf("%s: control: the attack does not arrive without a filter", a.name)
	}
}

// repel makes each attack from the open box, where it must arrive, and from
// the sandbox, where it must not, and must be counted under its reason.
func (b *box) repel(t testing.TB, attacks ...attack) {
	t.Helper()
	for _, a := range attacks {
		b.node.control(t, a)
	}
	var tokens []token
	for _, a := range attacks {
		k := newToken()
		b.node.await(k)
		tokens = append(tokens, k)
		frames := a.frames(b, k)
		before := b.drops(t)
		b.send(t, frames...)
		if got := b.dropped(t, a.reason, before, uint64(len(frames))); got != uint64(len(frames)) {
			t.Errorf("%s: %d frames, %d dropped for %s; before %v, after %v", a.name, len(frames), got, a.reason, before, b.drops(t))
		}
	}
	b.pass(t)
	for i, a := range attacks {
		if got := b.node.count(tokens[i]); got != 0 {
			t.Errorf("%s: arrived %d times", a.name, got)
		}
		b.node.forget(tokens[i])
	}
}

// dropped answers how many packets more than before were dropped for a reason,
// as soon as there are want.
func (b *box) dropped(t testing.TB, reason string, before map[string]uint64, want uint64) uint64 {
	t.Helper()
	for end := time.Now().Add(patience / 4); ; time.Sleep(time.Millisecond) {
		got := b.drops(t)[reason] - before[reason]
		if got >= want || time.Now().After(end) {
			return got
		}
	}
}

// dial connects from inside.
func (b *box) dial(network string, to netip.AddrPort, wait time.Duration) (c net.Conn, err error) {
	err = in(b.ns, func() error {
		d := net.Dialer{Timeout: wait, FallbackDelay: -1}
		c, err = d.Dial(network, to.String())
		return err
	})
	return c, err
}

// connects reports whether a TCP connection from the box comes up and answers.
func (b *box) connects(to netip.AddrPort, wait time.Duration) bool {
	c, err := b.dial("tcp", to, wait)
	if err != nil {
		return false
	}
	defer c.Close()
	return ping(c, wait) == nil
}

// ping asks the echo server behind a connection.
func ping(c net.Conn, wait time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 16))
	return err
}
