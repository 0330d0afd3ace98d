// SPDX-License-Identifier: Apache-2.0

package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// objectTimeouts names the timeouts of TCP connections of sandboxes.
const objectTimeouts = "tcp"

const (
	// timeWait is how long conntrack keeps a TCP connection that both ends
	// have closed. Nobody counts it, so it bounds how many such entries there
	// are.
	timeWait = 5 * time.Second
	// synSent is how long conntrack waits for an answer. After the fourth
	// repetition of a SYN the pause is longer; the fifth counts as a new
	// connection.
	synSent = 15 * time.Second
)

// tcpTimeouts are seconds by kind, which are CTA_TIMEOUT_TCP_* of
// linux/netfilter/nfnetlink_cttimeout.h. Kind 0 is none.
type tcpTimeouts [12]uint32

// timeoutKinds names the timeouts of conntrack by kind: the end of the name of
// the sysctl, and what Linux has by default, in seconds.
var timeoutKinds = [len(tcpTimeouts{})]struct {
	sysctl string
	linux  uint32
}{
	1:  {"syn_sent", 120},
	2:  {"syn_recv", 60},
	3:  {"established", 432000},
	4:  {"fin_wait", 120},
	5:  {"close_wait", 60},
	6:  {"last_ack", 30},
	7:  {"time_wait", 120},
	8:  {"close", 10},
	9:  {"", 120}, // both sent SYN
	10: {"max_retrans", 300},
	11: {"unacknowledged", 300},
}

const (
	kindSynSent  = 1
	kindTimeWait = 7
	kindClose    = 8
	kindSynSent2 = 9
)

// wantTimeouts answers the timeouts for sandboxes: those of the host, of which
// some are shorter, or none at all.
//
// An entry that a reset has closed goes at once. It must not stay: nobody
// counts it, and the kernel lets a SYN that follows it by, and opens the same
// entry again if a SYN/ACK answers, without a first packet that could be
// counted. Two ends that work together would hold any number of connections.
// Those that both ends closed with FIN are not opened again: the kernel makes
// a new entry.
func wantTimeouts() (want tcpTimeouts, err error) {
	for kind, k := range timeoutKinds {
		if want[kind] = k.linux; k.sysctl == "" {
			continue
		}
		path := "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_" + k.sysctl
		text, err := readSysctl(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // conntrack is not loaded yet
		}
		if err != nil {
			return want, err
		}
		v, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return want, fmt.Errorf("read %s: %w", path, err)
		}
		want[kind] = uint32(v)
	}
	want[kindSynSent] = min(want[kindSynSent], uint32(synSent/time.Second))
	want[kindSynSent2] = want[kindSynSent]
	want[kindTimeWait] = min(want[kindTimeWait], uint32(timeWait/time.Second))
	want[kindClose] = 0
	return want, nil
}

// readTimeouts answers the timeouts that the table has, all 0 if they are not
// for TCP; ok is false if it has none.
func (c *conn) readTimeouts(table string) (have tcpTimeouts, ok bool, err error) {
	objs, err := c.objects(table, unix.NFT_OBJECT_CT_TIMEOUT)
	if err != nil {
		return have, false, err
	}
	i := slices.IndexFunc(objs, func(o object) bool { return o.name == objectTimeouts })
	if i < 0 {
		return have, false, nil
	}
	have, err = parseTimeouts(objs[i].data)
	return have, true, err
}

func parseTimeouts(b []byte) (have tcpTimeouts, err error) {
	isTCP := false
	err = eachAttr(b, func(typ uint16, _, value []byte) error {
		switch typ {
		case expr.NFTA_CT_TIMEOUT_L4PROTO:
			isTCP = len(value) == 1 && value[0] == unix.IPPROTO_TCP
		case expr.NFTA_CT_TIMEOUT_DATA:
			return eachAttr(value, func(kind uint16, _, value []byte) error {
				if len(value) != 4 {
					return errShort
				}
				if int(kind) < len(have) {
					have[kind] = binary.BigEndian.Uint32(value)
				}
				return nil
			})
		}
		return nil
	})
	if !isTCP {
		have = tcpTimeouts{}
	}
	return have, err
}

// verifyTimeouts compares the timeouts with those that the kernel was given.
//
// +checklocks:m.rules.mu
func (m *Manager) verifyTimeouts() error {
	have, ok, err := m.rules.rd.readTimeouts(m.cfg.Table)
	if err != nil {
		return err
	}
	if !ok {
		return drift(repairTable, "table inet %s: ct timeout %s is missing", m.cfg.Table, objectTimeouts)
	}
	for kind, want := range m.rules.timeouts {
		if have[kind] != want {
			return drift(repairTable, "table inet %s: ct timeout %s is %d s for kind %d, want %d s",
				m.cfg.Table, objectTimeouts, have[kind], kind, want)
		}
	}
	return nil
}

// marshalling guards a variable of the library, in which it keeps the
// timeouts that it marshals (v0.3.0).
var marshalling sync.Mutex

// addTimeouts adds to the transaction that the timeouts are what they should
// be. The kernel does not change them, so others must be made anew; no rule
// may hold them. Connections that had the old ones get the host's.
//
// +checklocks:m.rules.mu
func (m *Manager) addTimeouts(tx *nftables.Conn, tableExists bool) error {
	want, err := wantTimeouts()
	if err != nil {
		return err
	}
	obj := &nftables.NamedObj{Table: m.table(), Name: objectTimeouts, Type: nftables.ObjTypeCtTimeout}
	if tableExists {
		have, ok, err := m.rules.rd.readTimeouts(m.cfg.Table)
		if err != nil {
			return err
		}
		if ok && have == want {
			m.rules.timeouts = want
			return nil
		}
		if ok {
			tx.DeleteObject(obj)
		}
	}
	policy := expr.CtStatePolicyTimeout{}
	for kind := 1; kind < len(want); kind++ {
		policy[uint16(kind-1)] = want[kind]
	}
	obj.Obj = &expr.CtTimeout{L3Proto: unix.NFPROTO_INET, L4Proto: unix.IPPROTO_TCP, Policy: policy}
	marshalling.Lock()
	defer marshalling.Unlock()
	tx.AddObj(obj)
	m.rules.timeouts = want
	return nil
}

// setTimeouts gives a connection that is not yet in conntrack the timeouts.
// It does nothing to what is not TCP.
func setTimeouts() []expr.Any {
	return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: objectTimeouts}}
}
