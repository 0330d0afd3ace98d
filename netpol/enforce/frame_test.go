// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
)

// frame is a packet under construction; the zero value of each field is what
// an honest sandbox in slot 1 sends.
type frame struct {
	src, dst netip.Addr
	srcMAC   []byte
	tags     []uint16 // ethertypes of VLAN tags before the real one
	ether    uint16
	proto    byte
	port     uint16
	sport    uint16
	udp      bool
	ihl      byte   // words
	options  []byte // after the fixed IPv4 header
	frag     uint16 // flags and offset
	lengthBy int    // added to tot_len or payload_len
	udpBy    int    // added to the UDP length
	doff     byte   // words
	tcpOpts  int    // bytes after the fixed TCP header
	ext      []ext  // IPv6 extension headers
	payload  int
	trailer  int // bytes after the packet
	flags    byte
	version  byte
	l4       []byte // instead of TCP or UDP
}

type ext struct {
	kind byte
	body []byte // after the next header byte
}

func (f frame) bytes() []byte {
	if !f.dst.IsValid() {
		f.dst = netip.MustParseAddr("192.0.2.1")
	}
	v6 := f.dst.Is6()
	if !f.src.IsValid() {
		f.src = addr4(testSlot)
		if v6 {
			f.src = addr6(testSlot)
		}
	}
	if f.srcMAC == nil {
		f.srcMAC = []byte{0x02, 0x62, 0x68, 0, 0, testSlot}
	}
	if f.port == 0 {
		f.port = 443
	}
	if f.sport == 0 {
		f.sport = 50000
	}
	if f.flags == 0 {
		f.flags = 2
	}
	if f.doff == 0 {
		f.doff = byte(5 + f.tcpOpts/4)
	}
	b := append([]byte{}, hostMAC[:]...)
	b = append(b, f.srcMAC...)
	for i, tag := range f.tags {
		b = binary.BigEndian.AppendUint16(b, tag)
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	proto, l4 := byte(6), f.l4
	switch {
	case l4 != nil:
		proto = f.proto
	case f.udp:
		proto = 17
		l4 = make([]byte, 8+f.payload)
		binary.BigEndian.PutUint16(l4, f.sport)
		binary.BigEndian.PutUint16(l4[2:], f.port)
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)+f.udpBy))
	default:
		l4 = make([]byte, 20+f.tcpOpts+f.payload)
		binary.BigEndian.PutUint16(l4, f.sport)
		binary.BigEndian.PutUint16(l4[2:], f.port)
		l4[12], l4[13] = f.doff<<4, f.flags
	}
	if f.proto != 0 {
		proto = f.proto
	}
	ether, version := f.ether, f.version
	var ip []byte
	if v6 {
		if ether == 0 {
			ether = 0x86dd
		}
		if version == 0 {
			version = 6
		}
		for i := len(f.ext) - 1; i >= 0; i-- {
			l4 = append(append([]byte{proto}, f.ext[i].body...), l4...)
			proto = f.ext[i].kind
		}
		ip = make([]byte, 40)
		ip[6], ip[7] = proto, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)+f.lengthBy))
		src, dst := f.src.As16(), f.dst.As16()
		copy(ip[8:], src[:])
		copy(ip[24:], dst[:])
	} else {
		if ether == 0 {
			ether = 0x0800
		}
		if version == 0 {
			version = 4
		}
		if f.ihl == 0 {
			f.ihl = byte(5 + len(f.options)/4)
		}
		ip = append(make([]byte, 20), f.options...)
		ip[0], ip[8], ip[9] = f.ihl, 64, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(l4)+f.lengthBy))
		binary.BigEndian.PutUint16(ip[6:], f.frag)
		src, dst := f.src.As4(), f.dst.As4()
		copy(ip[12:], src[:])
		copy(ip[16:], dst[:])
	}
	ip[0] = ip[0]&0x0f | version<<4
	if !v6 {
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	}
	b = binary.BigEndian.AppendUint16(b, ether)
	b = append(append(b, ip...), l4...)
	return append(b, make([]byte, f.trailer)...)
}

// echo is an echo request of n bytes of IP to dst.
func echo(dst netip.Addr, n int) frame {
	f := frame{dst: dst, proto: 1, l4: make([]byte, n-20)}
	f.l4[0] = 8
	if dst.Is6() {
		f.proto, f.l4 = 58, make([]byte, n-40)
		f.l4[0] = 128
	}
	return f
}

// toSandbox turns a frame around: what the peer answers.
func (f frame) toSandbox() []byte {
	b := f.bytes()
	copy(b, []byte{0x02, 0x62, 0x68, 0, 0, testSlot})
	copy(b[6:], hostMAC[:])
	return b
}

// Offsets in struct __sk_buff.
const (
	skbMark    = 8
	skbGSOSize = 176
)

// result is what a test run of a program did.
type result struct {
	ret  int32
	mark uint32
}

// run runs a program on a frame. It fails the test if the kernel refuses it.
func run(t testing.TB, p *ebpf.Program, data []byte, gso uint32) result {
	t.Helper()
	r, err := tryRun(p, data, gso)
	if err != nil {
		t.Fatalf("run %d bytes % x: %v", len(data), data, err)
	}
	return r
}

func tryRun(p *ebpf.Program, data []byte, gso uint32) (result, error) {
	in, out := make([]byte, skbSize), make([]byte, skbSize)
	binary.NativeEndian.PutUint32(in[skbGSOSize:], gso)
	ret, err := p.Run(&ebpf.RunOptions{Data: data, Context: in, ContextOut: out})
	return result{int32(ret), binary.NativeEndian.Uint32(out[skbMark:])}, err
}

const (
	next = -1
	drop = 2
)

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
