// SPDX-License-Identifier: Apache-2.0

package link

import (
	"bytes"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Names of linux/netfilter/nfnetlink_conntrack.h that x/sys lacks.
const (
	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaID         = 12
	ctaTupleIP    = 1
	ctaIPv4Src    = 1
	ctaIPv6Src    = 3

	ctGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2
)

// sweeper deletes the conntrack entries of removed sandboxes. A pass reads
// the whole of conntrack, so everyone who comes while one runs shares the
// next: many removals at once cost two passes, not many.
//
// The kernel could pick the entries of one address, but for IPv6 it picks all
// the others (seen up to Linux 6.18), and to list it must lock each bucket
// of its table all the same, which is what a pass costs: 10 ms for the 262144
// buckets of a large host. To delete by connection mark costs a fiftieth, but
// anyone's rules may change a mark, and what was missed would be the next
// sandbox's.
type sweeper struct {
	running sync.Mutex // held by the pass that runs

	mu   sync.Mutex
	next *pass // +checklocks:mu; the pass that has not begun
}

// pass is one reading. Its fields after addrs belong to sweeper.running.
type pass struct {
	addrs map[netip.Addr]bool // grows until the pass begins
	done  bool
	err   error
}

// forget deletes the entries that the addresses began or answer, and then
// the notes that there may be some. The links must be gone, or new entries
// may come meanwhile.
func (m *Manager) forget(addrs ...netip.Addr) error {
	s := &m.sweeper
	s.mu.Lock()
	if s.next == nil {
		s.next = &pass{addrs: map[netip.Addr]bool{}}
	}
	p := s.next
	for _, a := range addrs {
		p.addrs[a] = true
	}
	s.mu.Unlock()

	s.running.Lock()
	defer s.running.Unlock()
	if p.done {
		return p.err
	}
	s.mu.Lock()
	s.next = nil // p is the next: an older one is done, a newer one not begun
	s.mu.Unlock()
	p.done = true
	if p.err = sweepFlows(func(a netip.Addr) bool { return p.addrs[a] }); p.err != nil {
		return p.err
	}
	if p.err = m.failpoint("flows removed"); p.err != nil {
		return p.err
	}
	p.err = m.deleteNotes(slices.Collect(maps.Keys(p.addrs)))
	return p.err
}

// deleteBatch bounds how many deletions go to the kernel at a time; their
// answers must fit the socket's buffer.
const deleteBatch = 64

// sweepFlows deletes every conntrack entry that began at an address of which
// stale says so, or that such an address answers: what came in by a
// published port.
func sweepFlows(stale func(netip.Addr) bool) (err error) {
	c, err := dialProto(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	var flows []flow
	err = c.eachFlow(func(f flow) {
		if stale(f.src) || stale(f.answers) {
			f.attrs = bytes.Clone(f.attrs)
			flows = append(flows, f)
		}
	})
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(flows, deleteBatch) {
		reqs := make([]*request, len(batch))
		for i, f := range batch {
			reqs[i] = newRequest("delete conntrack entry of "+f.src.String(), ctDelete, 0, unix.ENOENT)
			reqs[i].add(&nl.Nfgenmsg{NfgenFamily: f.family})
			reqs[i].msg.AddRawData(f.attrs)
		}
		if err := c.do(reqs...); err != nil {
			return err
		}
	}
	return nil
}

// flow names one conntrack entry: the attributes that delete it.
type flow struct {
	family       uint8
	src, answers netip.Addr // who began it, and who answers
	attrs        []byte
}

// eachFlow reads all of conntrack. A flow's bytes are f's only during the call.
func (c *conn) eachFlow(f func(flow)) error {
	r := &request{op: "list conntrack entries", msg: nl.NewNetlinkRequest(ctGet, unix.NLM_F_DUMP)}
	r.add(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC})
	err := c.get(r, func(_ uint16, b []byte) error {
		fl, err := parseFlow(b)
		if err == nil {
			f(fl)
		}
		return err
	})
	// A listing that was disturbed has still shown every entry that was there
	// throughout, and only those matter.
	if errors.Is(err, errInterrupted) {
		return nil
	}
	return err
}

// parseFlow reads one entry. The tuple is kept as it came: it may hold
// fields of protocols that this package need not know.
func parseFlow(b []byte) (flow, error) {
	if len(b) < nl.SizeofNfgenmsg {
		return flow{}, errShort
	}
	f := flow{family: b[0]}
	err := eachAttr(b[nl.SizeofNfgenmsg:], func(typ uint16, whole, value []byte) (err error) {
		switch typ {
		case ctaTupleOrig:
			f.attrs = append(f.attrs, whole...)
			f.src, err = parseSource(value)
		case ctaTupleReply:
			f.answers, err = parseSource(value)
		case ctaID:
			f.attrs = append(f.attrs, whole...)
		}
		return err
	})
	return f, err
}

// parseSource finds the source address of a tuple.
func parseSource(tuple []byte) (src netip.Addr, err error) {
	err = within(tuple, ctaTupleIP, func(value []byte) error {
		return eachAttr(value, func(typ uint16, _, value []byte) error {
			if typ == ctaIPv4Src || typ == ctaIPv6Src {
				src, _ = netip.AddrFromSlice(value)
			}
			return nil
		})
	})
	return src, err
}
