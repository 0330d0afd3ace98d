// SPDX-License-Identifier: Apache-2.0

// Package openshell turns the part of an OpenShell sandbox policy that is
// about addresses, names and ports into an EgressPolicy.
//
// An OpenShell policy (version 1) allows a destination to certain binaries,
// and often only certain requests to it. A policy here knows neither. An
// import never allows more than the original did: what has a condition that
// cannot be kept is left out, and each thing left out is a Note. Whoever wants
// to do without a condition says so in Options.
package openshell

import (
	"bytes"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Options give up conditions of the original. The zero Options give up none.
type Options struct {
	// IgnoreBinaries imports what the original allows to certain binaries
	// only: every process of the sandbox may go there then.
	IgnoreBinaries bool
	// IgnoreAllowedIPs imports a name that may only resolve into allowed_ips
	// as an fqdn with allow_private: it may resolve to anything then.
	IgnoreAllowedIPs bool
}

// Note says what was not imported, or not as it was.
type Note struct {
	Line int
	Path string // of the key, as in network_policies.api.endpoints[0]
	Why  string
}

func (n Note) String() string { return fmt.Sprintf("line %d: %s: %s", n.Line, n.Path, n.Why) }

// Import is Options{}.Import.
func Import(file string, data []byte) (policy []byte, notes []Note, err error) {
	return Options{}.Import(file, data)
}

// Import reads an OpenShell policy and writes one that netpol.Parse reads.
// The notes are in the order of their lines. Errors are *netpol.Error: the
// file is not an OpenShell policy of version 1, or what remains of it is too
// large for one policy.
func (o Options) Import(file string, data []byte) (policy []byte, notes []Note, err error) {
	d, err := netpol.ReadDocument(file, data)
	if err != nil {
		return nil, nil, err
	}
	im := importer{opts: o, used: map[string]bool{}}
	top := pairs(d.Root)
	version := top.get("version")
	if version == nil || version.Value != "1" {
		d.Errorf(d.Root, `is not an OpenShell policy: it must say "version: 1"`)
		return nil, nil, d.Err()
	}
	im.middlewares = top.get("network_middlewares")
	for _, p := range top {
		switch p.key {
		case "version":
		case "network_policies":
			if p.value.Kind != yaml.MappingNode {
				d.Errorf(p.value, "network_policies must be a mapping")
				return nil, nil, d.Err()
			}
			im.inspect(p.value)
			for _, np := range pairs(p.value) {
				im.policy(np)
			}
		case "network_middlewares":
			im.note(p.line, p.key, "nothing looks into the traffic: what a middleware may concern is left out")
		case "filesystem_policy", "landlock", "process":
			im.note(p.line, p.key, "is not about egress")
		default:
			im.note(p.line, p.key, "is not known")
		}
	}
	out := im.write(file)
	if _, err := netpol.Parse(file, out); err != nil {
		return nil, nil, err
	}
	slices.SortStableFunc(im.notes, func(a, b Note) int { return a.Line - b.Line })
	return out, im.notes, nil
}

// pair is a key of a mapping and its value.
type pair struct {
	key   string
	line  int
	value *yaml.Node
}

type mapping []pair

// pairs reads a mapping; anything else has no pairs.
func pairs(n *yaml.Node) mapping {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	var out mapping
	for i := 0; i+1 < len(n.Content); i += 2 {
		out = append(out, pair{n.Content[i].Value, n.Content[i].Line, n.Content[i+1]})
	}
	return out
}

func (m mapping) get(key string) *yaml.Node {
	for _, p := range m {
		if p.key == key {
			return p.value
		}
	}
	return nil
}

type importer struct {
	opts        Options
	notes       []Note
	rules       []string
	used        map[string]bool // names of rules
	middlewares *yaml.Node
	inspected   []string // hosts to which some requests only are allowed
}

func (im *importer) note(line int, path, format string, args ...any) {
	im.notes = append(im.notes, Note{line, path, fmt.Sprintf(format, args...)})
}

// policy imports one entry of network_policies.
func (im *importer) policy(p pair) {
	path := "network_policies." + p.key
	if p.value.Kind != yaml.MappingNode {
		im.note(p.line, path, "is not a mapping: left out")
		return
	}
	fields := pairs(p.value)
	for _, f := range fields {
		switch f.key {
		case "name", "endpoints", "binaries":
		default:
			im.note(f.line, path+"."+f.key, "is not known and may be a condition: the policy is left out")
			return
		}
	}
	binaries := fields.get("binaries")
	if why := restricted(binaries); why != "" {
		line := p.line
		if binaries != nil {
			line = binaries.Line
		}
		if !im.opts.IgnoreBinaries {
			im.note(line, path+".binaries", "%s, and a policy here cannot tell binaries apart: the policy is left out", why)
			return
		}
		im.note(line, path+".binaries", "%s; imported for all of the sandbox, as asked for", why)
	}
	endpoints := fields.get("endpoints")
	if endpoints == nil || endpoints.Kind != yaml.SequenceNode {
		im.note(p.line, path, "has no list of endpoints: left out")
		return
	}
	for i, e := range endpoints.Content {
		at := fmt.Sprintf("%s.endpoints[%d]", path, i)
		to, ports, why := im.endpoint(e, at)
		if why == "" {
			why = im.add(p.key, to, ports)
		}
		if why != "" {
			im.note(e.Line, at, "%s: the endpoint is left out", why)
		}
	}
}

// inspect finds the hosts of endpoints that allow some requests only: another
// endpoint may not be read as if it allowed all of them.
func (im *importer) inspect(policies *yaml.Node) {
	for _, p := range pairs(policies) {
		endpoints := pairs(p.value).get("endpoints")
		if endpoints == nil {
			continue
		}
		for _, e := range endpoints.Content {
			if fields := pairs(e); requestsOnly(fields) != "" {
				if host := fields.get("host"); host != nil {
					im.inspected = append(im.inspected, hostName(host))
				}
			}
		}
	}
}

// requestsOnly says why an endpoint does not allow all traffic, or "".
func requestsOnly(fields mapping) string {
	for _, f := range fields {
		switch f.key {
		case "protocol":
			if f.value.Value != "tcp" {
				return fmt.Sprintf("protocol %.40s needs to look into the traffic", f.value.Value)
			}
		case "path", "access", "rules", "deny_rules":
			return f.key + " allows some requests only, and a policy here cannot tell requests apart"
		}
	}
	return ""
}

func hostName(n *yaml.Node) string { return strings.ToLower(strings.TrimSuffix(n.Value, ".")) }

// restricted says which binaries alone may use a policy, or "" if all may.
func restricted(binaries *yaml.Node) string {
	if binaries == nil || binaries.Kind != yaml.SequenceNode || len(binaries.Content) == 0 {
		return "lists no binaries, so that none matches"
	}
	var list []string
	for _, b := range binaries.Content {
		path := pairs(b).get("path")
		switch {
		case path == nil, len(pairs(b)) != 1:
			list = append(list, "?")
		case path.Value == "/**", path.Value == "**":
			return ""
		default:
			list = append(list, fmt.Sprintf("%.80s", path.Value))
		}
	}
	return "is for " + strings.Join(list, ", ") + " only"
}

// endpoint answers the targets and the ports of an endpoint, as the policy
// writes them, or why it has none.
func (im *importer) endpoint(n *yaml.Node, at string) (to, ports []string, why string) {
	if n.Kind != yaml.MappingNode {
		return nil, nil, "is not a mapping"
	}
	fields := pairs(n)
	if why := requestsOnly(fields); why != "" {
		return nil, nil, why
	}
	for _, f := range fields {
		switch f.key {
		case "host", "port", "ports", "allowed_ips", "protocol":
		case "tls", "enforcement":
			if f.key == "tls" && f.value.Value != "skip" {
				return nil, nil, fmt.Sprintf("tls %.40s needs to look into the traffic", f.value.Value)
			}
			im.note(f.line, at+"."+f.key, "has no meaning where nothing looks into the traffic")
		default:
			return nil, nil, fmt.Sprintf("%.60q has no counterpart here", f.key)
		}
	}
	ports, why = portList(fields)
	if why != "" {
		return nil, nil, why
	}
	allowed, why := allowedIPs(fields.get("allowed_ips"))
	if why != "" {
		return nil, nil, why
	}
	host := fields.get("host")
	if host == nil {
		if len(allowed) == 0 {
			return nil, nil, "has neither host nor allowed_ips"
		}
		if mw := middlewareOf(im.middlewares, allowed[0].Addr().String()); mw != "" {
			return nil, nil, concerned(mw)
		}
		return cidrs(allowed), ports, ""
	}
	to, why = im.hostTarget(host, allowed, at)
	return to, ports, why
}

func portList(fields mapping) (ports []string, why string) {
	one, many := fields.get("port"), fields.get("ports")
	var nodes []*yaml.Node
	switch {
	case one != nil && many != nil:
		return nil, "has both port and ports"
	case one != nil:
		nodes = []*yaml.Node{one}
	case many != nil && many.Kind == yaml.SequenceNode:
		nodes = many.Content
	}
	if len(nodes) == 0 {
		return nil, "has no port"
	}
	for _, n := range nodes {
		port, err := strconv.ParseUint(n.Value, 10, 16)
		if err != nil || port == 0 {
			return nil, fmt.Sprintf("port %.20q is not a port", n.Value)
		}
		ports = append(ports, strconv.FormatUint(port, 10)+"/tcp")
	}
	return ports, ""
}

func allowedIPs(n *yaml.Node) (out []netip.Prefix, why string) {
	if n == nil {
		return nil, ""
	}
	if n.Kind != yaml.SequenceNode || len(n.Content) == 0 {
		return nil, "allowed_ips is not a list of prefixes"
	}
	for _, item := range n.Content {
		p, err := netip.ParsePrefix(item.Value)
		if a, err2 := netip.ParseAddr(item.Value); err2 == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			return nil, fmt.Sprintf("allowed_ips has %.60q, which is not a prefix", item.Value)
		}
		if p = p.Masked(); !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out, ""
}

func cidrs(list []netip.Prefix) []string {
	out := make([]string, len(list))
	for i, p := range list {
		out[i] = fmt.Sprintf("{cidr: %q}", p)
	}
	return out
}

// hostTarget answers the target of an endpoint with a host.
func (im *importer) hostTarget(host *yaml.Node, allowed []netip.Prefix, at string) (to []string, why string) {
	name := hostName(host)
	if mw := middlewareOf(im.middlewares, name); mw != "" {
		return nil, concerned(mw)
	}
	if a, err := netip.ParseAddr(name); err == nil {
		if slices.Contains(im.inspected, name) {
			return nil, "another endpoint allows some requests only to the same host"
		}
		in := slices.ContainsFunc(allowed, func(p netip.Prefix) bool { return p.Contains(a) })
		switch {
		case len(allowed) > 0 && !in:
			return nil, fmt.Sprintf("%s is not in its allowed_ips", a)
		case !in && netpol.PrivateAddr(a):
			return nil, fmt.Sprintf("%s is private, which the original refuses without allowed_ips", a)
		}
		return cidrs([]netip.Prefix{netip.PrefixFrom(a, a.BitLen())}), ""
	}
	pattern, err := netpol.ParsePattern(name)
	if err != nil {
		return nil, fmt.Sprintf("host %.80q %v", host.Value, err)
	}
	if slices.ContainsFunc(im.inspected, func(other string) bool { return mayOverlap(other, name) }) {
		return nil, "another endpoint allows some requests only to what may be the same host"
	}
	if len(allowed) == 0 {
		return []string{fmt.Sprintf("{fqdn: %q}", pattern)}, ""
	}
	if !im.opts.IgnoreAllowedIPs {
		return nil, "a name that may only resolve into allowed_ips has no counterpart here"
	}
	im.note(host.Line, at+".allowed_ips", "%s may resolve to any address, as asked for", pattern)
	return []string{fmt.Sprintf("{fqdn: %q, allow_private: true}", pattern)}, ""
}

func concerned(middleware string) string {
	return fmt.Sprintf("the middleware %.60s may concern it", middleware)
}

// middlewareOf names a middleware that may look into the traffic to a host, a
// pattern too. It answers too many rather than too few.
func middlewareOf(middlewares *yaml.Node, host string) string {
	for _, mw := range pairs(middlewares) {
		endpoints := pairs(pairs(mw.value).get("endpoints"))
		include := endpoints.get("include")
		if include == nil || include.Kind != yaml.SequenceNode {
			return mw.key
		}
		excluded := false
		if exclude := endpoints.get("exclude"); exclude != nil {
			for _, n := range exclude.Content {
				excluded = excluded || strings.ToLower(n.Value) == host
			}
		}
		if !excluded && slices.ContainsFunc(include.Content, func(n *yaml.Node) bool { return mayOverlap(strings.ToLower(n.Value), host) }) {
			return mw.key
		}
	}
	return ""
}

// mayOverlap says whether two patterns may match the same name: what follows
// their last stars must fit together.
func mayOverlap(a, b string) bool {
	tail := func(s string) string { return s[strings.LastIndexByte(s, '*')+1:] }
	switch ta, tb := tail(a), tail(b); {
	case ta == a && tb == b:
		return a == b
	case ta == a:
		return strings.HasSuffix(a, tb)
	case tb == b:
		return strings.HasSuffix(b, ta)
	default:
		return strings.HasSuffix(ta, tb) || strings.HasSuffix(tb, ta)
	}
}

var notInNames = regexp.MustCompile(`[^a-z0-9._-]+`)

// add makes a rule, unless the language refuses it: then it answers why.
func (im *importer) add(id string, to, ports []string) (why string) {
	base := strings.Trim(notInNames.ReplaceAllString(strings.ToLower(id), "-"), "._-")
	base = strings.TrimRight(base[:min(len(base), 55)], "._-")
	if base == "" {
		base = "rule"
	}
	name := base
	for i := 2; im.used[name]; i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	rule := fmt.Sprintf("- name: %q\n  action: allow\n  to: [%s]\n  ports: [%s]\n", name, strings.Join(to, ", "), strings.Join(ports, ", "))
	if _, err := netpol.Parse("", document([]string{rule})); err != nil {
		return strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	im.used[name] = true
	im.rules = append(im.rules, rule)
	return ""
}

func document(rules []string) []byte {
	if len(rules) == 0 {
		return []byte("kind: " + netpol.Kind + "\nname: openshell-import\nrules: []\n")
	}
	return []byte("kind: " + netpol.Kind + "\nname: openshell-import\nrules:\n" + strings.Join(rules, ""))
}

func (im *importer) write(file string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Imported from %q, an OpenShell sandbox policy.\n", filepath.Base(file))
	if n := len(im.notes); n > 0 {
		fmt.Fprintf(&b, "# Not everything could be: %d notes.\n", n)
	}
	b.Write(document(im.rules))
	return b.Bytes()
}
