// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"encoding/binary"
	"net/netip"
)

// Ethertypes and protocols that frames use.
const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherARP  = 0x0806

	protoICMP  = 1
	protoTCP   = 6
	protoUDP   = 17
	protoICMP6 = 58
)

// packet is a frame under construction. Its zero fields are what an honest
// sender would put there.
type packet struct {
	src, dst netip.Addr
	srcMAC   []byte
	tags     []uint16 // ethertypes of VLAN tags in front, each for VLAN 0
	vid      uint16   // VLAN of the first tag
	ether    uint16
	version  byte
	ihl      byte   // words
	options  []byte // IPv4
	frag     uint16 // IPv4 flags and offset
	tooLong  int    // added to the IP length
	ext      []extension
	proto    byte
	l4       []byte // with its own header; nil is UDP
	port     uint16
	sport    uint16
	syn      bool // TCP SYN instead of UDP
	flags    byte // TCP, if not SYN
	payload  []byte
	trailer  []byte
	badSum   bool // leave the L4 checksum alone
	hops     byte
}

type extension struct {
	kind byte
	body []byte // after its first byte
}

// from fills in the sender.
func (p packet) from(b *box) []byte {
	v6 := p.dst.Is6()
	if !p.src.IsValid() {
		p.src = b.addr(v6)
	}
	if p.srcMAC == nil {
		p.srcMAC = b.mac
	}
	frame := append(append([]byte{}, b.gateway...), p.srcMAC...)
	for i, tag := range p.tags {
		vid := uint16(0)
		if i == 0 {
			vid = p.vid
		}
		frame = binary.BigEndian.AppendUint16(frame, tag)
		frame = binary.BigEndian.AppendUint16(frame, vid)
	}
	ether := p.ether
	if ether == 0 {
		ether = etherIPv4
		if v6 {
			ether = etherIPv6
		}
	}
	frame = binary.BigEndian.AppendUint16(frame, ether)
	return append(append(frame, p.ip()...), p.trailer...)
}

// ip answers the IP packet.
func (p packet) ip() []byte {
	proto, l4 := p.transport()
	if p.dst.Is6() {
		return p.ip6(proto, l4)
	}
	return p.ip4(proto, l4)
}

func (p packet) transport() (proto byte, l4 []byte) {
	port := p.port
	if port == 0 {
		port = 443
	}
	switch {
	case p.l4 != nil:
		proto, l4 = p.proto, append([]byte{}, p.l4...)
	case p.syn || p.flags != 0:
		proto = protoTCP
		l4 = append(make([]byte, 20), p.payload...)
		flags := p.flags
		if p.syn {
			flags |= 2
		}
		l4[12], l4[13] = 5<<4, flags
		binary.BigEndian.PutUint16(l4[14:], 64240)
	default:
		proto = protoUDP
		l4 = append(make([]byte, 8), p.payload...)
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
	}
	if p.l4 == nil {
		sport := p.sport
		if sport == 0 {
			sport = 50000
		}
		binary.BigEndian.PutUint16(l4, sport)
		binary.BigEndian.PutUint16(l4[2:], port)
	}
	if p.proto != 0 {
		proto = p.proto
	}
	if p.badSum {
		return proto, l4
	}
	at := map[byte]int{protoTCP: 16, protoUDP: 6, protoICMP: 2, protoICMP6: 2}[proto]
	if at == 0 || len(l4) < at+2 {
		return proto, l4
	}
	l4[at], l4[at+1] = 0, 0
	var sum uint32
	if proto != protoICMP {
		sum = pseudo(p.src, p.dst, proto, len(l4))
	}
	binary.BigEndian.PutUint16(l4[at:], checksum(l4, sum))
	return proto, l4
}

func (p packet) ip4(proto byte, l4 []byte) []byte {
	ip := append(make([]byte, 20), p.options...)
	version, ihl := p.version, p.ihl
	if version == 0 {
		version = 4
	}
	if ihl == 0 {
		ihl = byte(len(ip) / 4)
	}
	ip[0], ip[8], ip[9] = version<<4|ihl, p.ttl(), proto
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(l4)+p.tooLong))
	binary.BigEndian.PutUint16(ip[4:], 0x6268)
	binary.BigEndian.PutUint16(ip[6:], p.frag)
	src, dst := p.src.As4(), p.dst.As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(ip, 0))
	return append(ip, l4...)
}

func (p packet) ip6(proto byte, l4 []byte) []byte {
	for i := len(p.ext) - 1; i >= 0; i-- {
		l4 = append(append([]byte{proto}, p.ext[i].body...), l4...)
		proto = p.ext[i].kind
	}
	var ip [40]byte
	version := p.version
	if version == 0 {
		version = 6
	}
	ip[0], ip[6], ip[7] = version<<4, proto, p.ttl()
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)+p.tooLong))
	src, dst := p.src.As16(), p.dst.As16()
	copy(ip[8:], src[:])
	copy(ip[24:], dst[:])
	return append(ip[:], l4...)
}

func (p packet) ttl() byte {
	if p.hops == 0 {
		return 64
	}
	return p.hops
}

func pseudo(src, dst netip.Addr, proto byte, size int) (sum uint32) {
	for _, a := range [][]byte{src.AsSlice(), dst.AsSlice()} {
		for i := 0; i < len(a); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(a[i:]))
		}
	}
	return sum + uint32(proto) + uint32(size)
}

func checksum(b []byte, sum uint32) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// fragments cuts an IPv4 packet's payload into fragments of the given sizes;
// all but the last must be multiples of 8.
func (p packet) fragments(b *box, sizes ...int) [][]byte {
	if !p.src.IsValid() {
		p.src = b.addr4
	}
	proto, l4 := p.transport()
	var out [][]byte
	for i, at := 0, 0; i < len(sizes); i++ {
		end := min(at+sizes[i], len(l4))
		part := p
		part.proto, part.l4, part.badSum = proto, l4[at:end], true
		part.frag = uint16(at / 8)
		if i < len(sizes)-1 {
			part.frag |= 0x2000
		}
		out = append(out, part.from(b))
		at = end
	}
	return out
}
