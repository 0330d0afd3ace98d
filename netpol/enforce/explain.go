// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// Explanation says what the kernel does with a flow, and why.
type Explanation struct {
	Allowed      bool
	Reason       string // as in Drop
	Rule, Tenant string // the rule that decided and who set it; "" if none did
	Detail       string // Reason in words
	PolicyRev    uint64 // of the policy in force; 0 if a check before it decided
	Audit        string // the reason that it would be dropped for if the policy did not only watch; "" otherwise
}

// Offsets in struct __sk_buff, and our use of its cb: BH_CB_* in abi.h.
const (
	skbCB     = 48
	skbSize   = 192
	cbSlot    = skbCB
	cbReason  = skbCB + 4
	cbRule    = skbCB + 8
	cbPolicy  = skbCB + 12
	cbAudit   = skbCB + 16
	cbNoRule  = 0xffffffff
	tcxNext   = 0xffffffff // -1
	ipv4Bytes = 20
	ipv6Bytes = 40
	icmp6     = 58
	echo6     = 128 // the type of an echo request of ICMPv6
)

// hostMAC is where frames of sandboxes go.
var hostMAC = [6]byte{0x02, 0x62, 0x69, 0, 0, 1}

// Explain asks the kernel what it would do with the first packet of a flow. It
// runs the code that decides about packets on the maps in force and counts
// nothing. Limits are asked, too: Reason is rate or budget if one would stop that
// packet now. ErrNotFound if no sandbox has the slot.
func (e *Enforcer) Explain(slot uint32, f netpol.Flow) (Explanation, error) {
	if err := e.use(); err != nil {
		return Explanation{}, err
	}
	defer e.life.RUnlock()
	s, err := e.lockAny(slot)
	if err != nil {
		return Explanation{}, fmt.Errorf("explain: %w", err)
	}
	defer s.mu.Unlock()
	if !f.Dst.IsValid() {
		return Explanation{}, fmt.Errorf("explain: no destination")
	}
	// A socket that connects to ::ffff:a.b.c.d sends IPv4.
	f.Dst = f.Dst.Unmap().WithZone("")
	sender := e.shm.values[slot]
	if sender.Has&family(f.Dst) == 0 {
		detail := detailNoAddr4
		if f.Dst.Is6() {
			detail = detailNoAddr6
		}
		return Explanation{Reason: reasonNoAddr, Detail: detail}, nil
	}
	v, err := e.ask(slot, synthesize(&sender, f))
	if err != nil {
		return Explanation{}, fmt.Errorf("explain slot %d: %w", slot, err)
	}
	out := Explanation{Allowed: v.reason == allowed, Reason: reasonName(v.reason), Detail: reasonDetail(v.reason)}
	if v.audit != allowed {
		out.Audit = reasonName(v.audit)
	}
	if v.rule != cbNoRule {
		out.Tenant, out.Rule = s.ruleOf(v.rule)
	}
	if v.policy != 0 {
		info, err := e.pool.infoOf(v.policy)
		if err != nil {
			return Explanation{}, fmt.Errorf("explain slot %d: %w", slot, err)
		}
		out.PolicyRev = info.Rev
	}
	return out, nil
}

// verdict is what the explain program answers.
type verdict struct {
	reason, audit reason
	rule, policy  uint32
}

// ask runs the explain program on a frame of the slot.
func (e *Enforcer) ask(slot uint32, frame []byte) (verdict, error) {
	in, out := make([]byte, skbSize), make([]byte, skbSize)
	binary.NativeEndian.PutUint32(in[cbSlot:], slot)
	ret, err := e.explain.Run(&ebpf.RunOptions{Data: frame, Context: in, ContextOut: out})
	if err != nil {
		return verdict{}, fmt.Errorf("run program: %w", err)
	}
	v := verdict{
		reason: reason(binary.NativeEndian.Uint32(out[cbReason:])),
		rule:   binary.NativeEndian.Uint32(out[cbRule:]),
		policy: binary.NativeEndian.Uint32(out[cbPolicy:]),
		audit:  reason(binary.NativeEndian.Uint32(out[cbAudit:])),
	}
	if (ret == tcxNext) != (v.reason == allowed) {
		return verdict{}, fmt.Errorf("program answers %d with reason %d", int32(ret), v.reason)
	}
	return v, nil
}

// synthesize is the first frame of a flow as the sandbox would send it.
func synthesize(s *bpf.DatapathBhSlot, f netpol.Flow) []byte {
	var l4 []byte
	switch f.Proto {
	case netpol.TCP:
		l4 = make([]byte, 20)
		l4[12] = 5 << 4 // words of header
		l4[13] = 2      // SYN
	case netpol.ICMP, icmp6:
		l4 = make([]byte, 8)
		l4[0] = byte(f.Port)
		if f.Proto == netpol.ICMP && f.Dst.Is6() {
			f.Proto = icmp6
			if f.Port == netpol.EchoPort {
				l4[0] = echo6
			}
		}
	default:
		l4 = make([]byte, 8)
		binary.BigEndian.PutUint16(l4[4:], 8)
	}
	if f.Proto == netpol.TCP || f.Proto == netpol.UDP {
		binary.BigEndian.PutUint16(l4, 49152)
		binary.BigEndian.PutUint16(l4[2:], f.Port)
	}
	frame := append(append([]byte{}, hostMAC[:]...), s.Mac[:]...)
	if f.Dst.Is4() {
		frame = append(frame, 0x08, 0x00)
		ip := make([]byte, ipv4Bytes)
		ip[0], ip[8], ip[9] = 0x45, 64, byte(f.Proto)
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(l4)))
		binary.NativeEndian.PutUint32(ip[12:], s.Addr4)
		copy(ip[16:], f.Dst.AsSlice())
		return append(append(frame, ip...), l4...)
	}
	frame = append(frame, 0x86, 0xdd)
	ip := make([]byte, ipv6Bytes)
	ip[0], ip[6], ip[7] = 0x60, byte(f.Proto), 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
	binary.NativeEndian.PutUint64(ip[8:], s.Addr6[0])
	binary.NativeEndian.PutUint64(ip[16:], s.Addr6[1])
	copy(ip[24:], f.Dst.AsSlice())
	return append(append(frame, ip...), l4...)
}
