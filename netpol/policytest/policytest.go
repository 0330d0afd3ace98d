// SPDX-License-Identifier: Apache-2.0

// Package policytest tests egress policies offline: it reads cases, each a
// flow and what a policy must do with it, and holds a compiled policy against
// them.
//
// It asks the same evaluator that the datapath is tested against, plus the
// hard denies that hold on every node. It knows nothing of a node's own
// addresses and networks, of rates and of budgets, and resolves no names: a
// case says what a name resolves to.
package policytest

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Kind is what the kind key of a file of cases says.
const Kind = "PolicyTest"

// Verdicts that a case can expect.
const (
	Allow = "allow"
	Deny  = "deny"
	Audit = "audit" // passes for audit mode alone, and is recorded
)

// What a Result gives as its reason, apart from those of netpol and of
// netpol.HardDenied.
const (
	// ReasonStripped: the resolver takes the address out of the answer.
	ReasonStripped = "stripped_answer"
)

// maxCases of a file.
const maxCases = 10000

// unnamed is what a name resolves to if its case does not say: an address that
// belongs to nobody (TEST-NET-1, RFC 5737).
var unnamed = netip.MustParseAddr("192.0.2.1")

// Case is a flow and what must become of it.
type Case struct {
	Name     string
	Host     string     // name, lower case and without final dot; "" for an address
	Addr     netip.Addr // if Host is ""
	Port     uint16     // netpol.EchoPort for an ICMP echo request
	Proto    netpol.Proto
	Resolves []netip.Addr // of Host; all of them must fare alike
	Expect   string       // Allow, Deny or Audit
	Rule     string       // that must decide; "": any
	Tenant   string       // of the rule that must decide; "": any
	Line     int
}

// To is the destination as files write it.
func (c Case) To() string {
	host := c.Host
	if host == "" {
		host = c.Addr.String()
	}
	if c.Proto == netpol.ICMP {
		return "echo " + host
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + strconv.Itoa(int(c.Port))
}

// Load reads a file of cases. Every fault is an *netpol.Error with file and
// line; several are joined.
func Load(file string, data []byte) ([]Case, error) {
	d, err := netpol.ReadDocument(file, data)
	if err != nil {
		return nil, err
	}
	if d.Kind(d.Root, Kind) == "" {
		return nil, d.Err()
	}
	f := d.Fields(d.Root, "file", "kind", "cases")
	if f["cases"] == nil {
		d.Errorf(d.Root, "file has no cases: list at least one, as in {name: api, to: api.example.com:443, expect: allow}")
		return nil, d.Err()
	}
	items, ok := d.List(f["cases"], "cases")
	switch {
	case ok && len(items) == 0:
		d.Errorf(f["cases"], "cases is empty: it would test nothing")
	case len(items) > maxCases:
		d.Errorf(items[maxCases], "file has %d cases, at most %d are allowed", len(items), maxCases)
		return nil, d.Err()
	}
	r := reader{d}
	var out []Case
	first := map[string]int{}
	for i, n := range items {
		c := r.read(n, fmt.Sprintf("case %d", i+1))
		if at := first[c.Name]; c.Name != "" && at != 0 {
			d.Errorf(n, "case %q is there twice, first on line %d", c.Name, at)
		}
		first[c.Name] = n.Line
		out = append(out, c)
	}
	if err := d.Err(); err != nil {
		return nil, err
	}
	return out, nil
}

type reader struct{ *netpol.Document }

func (d reader) read(n *yaml.Node, what string) Case {
	c := Case{Line: n.Line}
	f := d.Fields(n, what, "name", "to", "proto", "resolves", "expect", "rule", "tenant")
	if n.Kind != yaml.MappingNode {
		return c
	}
	c.Name = d.text(n, f, what, "name")
	if c.Name != "" {
		what = fmt.Sprintf("case %q", c.Name)
	}
	if to := d.text(n, f, what, "to"); to != "" {
		if err := c.setTo(to); err != nil {
			d.Errorf(f["to"], "to %q of %s: %v", to, what, err)
		}
	}
	switch c.Expect = d.text(n, f, what, "expect"); c.Expect {
	case "", Allow, Deny, Audit:
	default:
		d.Errorf(f["expect"], "unknown expect %q of %s%s", c.Expect, what, netpol.Suggest(c.Expect, []string{Allow, Deny, Audit}))
	}
	if f["proto"] != nil {
		d.proto(f["proto"], what, &c)
	}
	if f["resolves"] != nil {
		c.Resolves = d.addrs(f["resolves"], what)
		if c.Host == "" && c.Addr.IsValid() {
			d.Errorf(f["resolves"], "%s leads to an address: resolves is for names", what)
		}
	}
	if f["rule"] != nil {
		c.Rule = d.text(n, f, what, "rule")
	}
	if f["tenant"] != nil {
		c.Tenant = d.text(n, f, what, "tenant")
	}
	return c
}

// text reads a key that must be there and not empty.
func (d reader) text(n *yaml.Node, f netpol.Fields, what, key string) string {
	if f[key] == nil {
		d.Errorf(n, "%s has no %s", what, key)
		return ""
	}
	s, ok := d.Text(f[key], key+" of "+what)
	if ok && s == "" {
		d.Errorf(f[key], "%s of %s is empty", key, what)
	}
	return s
}

// setTo reads api.example.com:443, 203.0.113.9:443, [2001:db8::1]:443 or
// "echo" and a name or an address.
func (c *Case) setTo(to string) error {
	host, ok := strings.CutPrefix(to, "echo ")
	if ok {
		c.Proto, c.Port = netpol.ICMP, netpol.EchoPort
		return c.setHost(strings.Trim(host, "[]"))
	}
	i := strings.LastIndexByte(to, ':')
	if i < 0 {
		return fmt.Errorf("has no port: write %s:443, or echo %s", to, to)
	}
	host = to[:i]
	port, err := strconv.ParseUint(to[i+1:], 10, 16)
	if err != nil || port == 0 || to[i+1] == '0' {
		return fmt.Errorf("%q is not a port, 1 to 65535", to[i+1:])
	}
	c.Proto, c.Port = netpol.TCP, uint16(port)
	if inner, ok := strings.CutPrefix(host, "["); ok {
		host, ok = strings.CutSuffix(inner, "]")
		if !ok {
			return fmt.Errorf("has a [ without a ]")
		}
	} else if strings.Contains(host, ":") {
		return fmt.Errorf("write an IPv6 address in brackets, as in [2001:db8::1]:443")
	}
	return c.setHost(host)
}

func (c *Case) setHost(host string) error {
	if a, err := netip.ParseAddr(host); err == nil {
		return c.setAddr(a)
	}
	if strings.Contains(host, "*") {
		return fmt.Errorf("is a pattern: write a name that it matches")
	}
	name, err := netpol.ParsePattern(host)
	c.Host = name
	return err
}

func (c *Case) setAddr(a netip.Addr) error {
	if a.Zone() != "" {
		return fmt.Errorf("has a zone, which no packet carries")
	}
	c.Addr = a
	return nil
}

func (d reader) proto(n *yaml.Node, what string, c *Case) {
	s, ok := d.Text(n, "proto of "+what)
	switch {
	case !ok:
	case c.Proto == netpol.ICMP:
		d.Errorf(n, "proto of %s: an echo has none, remove it", what)
	case s == "udp":
		c.Proto = netpol.UDP
	case s != "tcp":
		d.Errorf(n, "unknown proto %q of %s%s", s, what, netpol.Suggest(s, []string{"tcp", "udp"}))
	}
}

func (d reader) addrs(n *yaml.Node, what string) []netip.Addr {
	items, ok := d.List(n, "resolves of "+what)
	if ok && len(items) == 0 {
		d.Errorf(n, "resolves of %s is empty: list at least one address or remove it", what)
	}
	var out []netip.Addr
	for _, item := range items {
		s, ok := d.Text(item, "address of "+what)
		if !ok {
			continue
		}
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			d.Errorf(item, "%q in resolves of %s is not an address", s, what)
			continue
		}
		out = append(out, a)
	}
	return out
}

// Result is what a policy does with a case.
type Result struct {
	Case   Case
	Got    string     // Allow, Deny or Audit
	Rule   string     // that decided; "" if none did
	Tenant string     // of that rule
	Reason string     // netpol.Reason*, one of netpol.HardDenied, or ReasonStripped; of Audit: what it would have been denied for
	Addr   netip.Addr // for which that holds; invalid if a name is refused
	OK     bool       // as expected
}

// Run holds a program against cases, in their order.
func Run(prog netpol.Program, cases []Case) []Result {
	out := make([]Result, len(cases))
	for i, c := range cases {
		out[i] = run(prog, c)
	}
	return out
}

// run judges each address of a case. The first that does not fare as expected
// is the result.
func run(prog netpol.Program, c Case) Result {
	addrs := c.Resolves
	switch {
	case c.Host == "":
		addrs = []netip.Addr{c.Addr}
	case len(addrs) == 0:
		addrs = []netip.Addr{unnamed}
	}
	var name netpol.NameVerdict
	if c.Host != "" {
		name = prog.Name(c.Host)
		if !name.Allowed && !name.Audit {
			return finish(prog, Result{Case: c, Got: Deny, Reason: name.Reason}, name.Rule)
		}
	}
	var r Result
	for _, a := range addrs {
		if r = judge(prog, c, name, a); !r.OK {
			return r
		}
	}
	return r
}

// judge judges one address. name is the verdict on the name, if it has one.
func judge(prog netpol.Program, c Case, name netpol.NameVerdict, a netip.Addr) Result {
	r := Result{Case: c, Addr: a, Got: Deny}
	if reason := hardDenied(a); reason != "" {
		r.Reason = reason
		return finish(prog, r, -1)
	}
	flow := netpol.Flow{Proto: c.Proto, Dst: a, Port: c.Port}
	var v netpol.Verdict
	if c.Host == "" {
		v = prog.Evaluate(flow)
	} else {
		v = prog.Evaluate(flow, c.Host)
	}
	switch {
	case v.Allowed && name.Audit:
		r.Got, r.Reason, v.Rule = Audit, name.Reason, name.Rule
	case v.Audit != "":
		r.Got, r.Reason = Audit, v.Audit
	case v.Allowed:
		r.Got, r.Reason = Allow, v.Reason
	case c.Host != "" && v.Rule < 0 && stripped(prog, c.Host, a):
		r.Reason = ReasonStripped
	default:
		r.Reason = v.Reason
	}
	return finish(prog, r, v.Rule)
}

// stripped says whether an answer loses the address because it is private or
// of special use, not because no rule has ports for the name.
func stripped(prog netpol.Program, name string, a netip.Addr) bool {
	return (netpol.PrivateAddr(a) || netpol.SpecialUse(a)) && len(prog.Learn(name, a)) == 0
}

// hardDenied names why no policy can open an address, or "".
func hardDenied(a netip.Addr) string {
	best, reason := -1, ""
	for _, h := range netpol.HardDenied() {
		if h.Prefix.Contains(a) && h.Prefix.Bits() > best {
			best, reason = h.Prefix.Bits(), h.Reason
		}
	}
	if reason == "" && a.Is4In6() {
		return "reserved" // IPv4-mapped, which a prefix does not contain
	}
	return reason
}

func finish(prog netpol.Program, r Result, rule int) Result {
	if rule >= 0 {
		r.Rule, r.Tenant = prog.Rules[rule].Name, prog.Rules[rule].Tenant
	}
	c := r.Case
	r.OK = r.Got == c.Expect && (c.Rule == "" || c.Rule == r.Rule) && (c.Tenant == "" || c.Tenant == r.Tenant)
	return r
}

// String is one line for people: what was got, and what was wanted if that
// differs.
func (r Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", r.Case.Name, r.Case.To())
	if r.Case.Host != "" && r.Addr.IsValid() {
		fmt.Fprintf(&b, " at %s", r.Addr)
	}
	fmt.Fprintf(&b, ": got %s (%s", r.Got, r.Reason)
	if r.Rule != "" {
		fmt.Fprintf(&b, ", rule %s of %s", r.Rule, r.Tenant)
	}
	b.WriteString(")")
	if r.OK {
		return b.String()
	}
	want := []string{r.Case.Expect}
	if r.Case.Rule != "" {
		want = append(want, "rule "+r.Case.Rule)
	}
	if r.Case.Tenant != "" {
		want = append(want, "tenant "+r.Case.Tenant)
	}
	fmt.Fprintf(&b, ", want %s", strings.Join(want, ", "))
	return b.String()
}

// Failed lists the results that are not as expected.
func Failed(results []Result) []Result {
	return slices.DeleteFunc(slices.Clone(results), func(r Result) bool { return r.OK })
}
