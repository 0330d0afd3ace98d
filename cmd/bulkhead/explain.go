// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

const explainForm = "SANDBOX [PROTOCOL] TARGET"

func (c *cli) explainCmd() *cobra.Command {
	var exitCode, echo bool
	cmd := &cobra.Command{
		Use:   "explain " + explainForm,
		Short: "Say whether a sandbox may reach an address or a name, and by whose rule",
		Long: `Say whether a sandbox may reach an address or a name, and by whose rule. The answer comes
from the program in the kernel that decides about the packets themselves. Nothing is sent
and nothing is counted.

TARGET is ADDRESS:PORT or NAME:PORT, for TCP unless PROTOCOL says udp or the target begins
with udp://. With --echo or icmp:// it is an ICMP echo request, which has no port. Of a
name it is told whether the resolver answers it, and how each address that it has led to
is judged. Where a packet would pass, the rates, budgets and the limit of connections that
it meets are shown; they are looked at and not spent.`,
		Example: `  bulkhead explain web 203.0.113.10:443
  bulkhead explain web api.example.com:443
  bulkhead explain web udp [2001:db8::1]:53
  bulkhead explain web 203.0.113.10 --echo
  bulkhead explain web icmp://203.0.113.10
  bulkhead explain --exit-code web 169.254.169.254:80   # 3 if denied`,
		Args:              args(2, 3, explainForm),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, argv []string) error {
			protocol, target, err := splitTarget(argv[1:], echo)
			if err != nil {
				return err
			}
			req, err := flow(argv[0], protocol, target)
			if err != nil {
				return err
			}
			node, err := c.node()
			if err != nil {
				return err
			}
			resp, err := node.Explain(cmd.Context(), req)
			if err != nil {
				return err
			}
			if c.json() {
				err = render.JSON(c.stdout, resp, render.Field{Name: "protocol", Value: req.GetProtocol()},
					render.Field{Name: "address", Value: req.GetAddress()}, render.Field{Name: "port", Value: req.GetPort()})
			} else {
				err = render.Explanation(c.stdout, req, resp)
			}
			if err == nil && exitCode && !resp.GetAllowed() {
				return &exitError{code: exitDenied}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with 3 if it is denied")
	cmd.Flags().BoolVar(&echo, "echo", false, "ask about an ICMP echo request")
	return cmd
}

// splitTarget finds the protocol: before the target, in it, or TCP.
func splitTarget(argv []string, echo bool) (protocol, target string, err error) {
	target = argv[len(argv)-1]
	if len(argv) == 2 {
		protocol = argv[0]
	}
	if scheme, rest, ok := strings.Cut(target, "://"); ok {
		if protocol != "" {
			return "", "", usagef("%s and %s:// both name a protocol; leave one out", protocol, scheme)
		}
		protocol, target = scheme, rest
	}
	switch {
	case echo && protocol != "" && !isEcho(strings.ToLower(protocol)):
		return "", "", usagef("--echo is ICMP and not %s", protocol)
	case echo:
		protocol = "icmp"
	case protocol == "":
		protocol = "tcp"
	}
	return protocol, target, nil
}

func isEcho(protocol string) bool {
	switch protocol {
	case "icmp", "icmpv6", "icmp6", "ping", "echo":
		return true
	}
	return false
}

// flow reads what is asked about. A name is left to the agent to judge.
func flow(ref, protocol, target string) (*nodev1.ExplainRequest, error) {
	protocol = strings.ToLower(protocol)
	req := &nodev1.ExplainRequest{Ref: ref, Protocol: protocol}
	host := target
	switch {
	case isEcho(protocol):
		req.Protocol = "icmp"
	case protocol == "tcp" || protocol == "udp":
		if _, err := netip.ParseAddr(strings.Trim(target, "[]")); err == nil && !strings.Contains(target, "]:") {
			return nil, usagef("%s has no port; write it as in %s, or --echo for a ping", target, join(target, "443"))
		}
		i := strings.LastIndexByte(target, ':')
		if i < 0 {
			return nil, usagef("%q has no port; write 203.0.113.10:443, [2001:db8::1]:443 or api.example.com:443", target)
		}
		n, err := strconv.ParseUint(target[i+1:], 10, 16)
		if err != nil || n == 0 {
			return nil, usagef("%q is no port; ports are 1 to 65535", target[i+1:])
		}
		host, req.Port = target[:i], uint32(n)
	default:
		return nil, usagef("unknown protocol %q%s; there are tcp, udp and icmp", protocol, nearest(protocol, []string{"tcp", "udp", "icmp"}))
	}
	bare := strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	addr, err := netip.ParseAddr(bare)
	if named := err != nil; named {
		if bare == "" || strings.ContainsAny(bare, ":/[]% ") {
			return nil, usagef("%q is neither an address nor a name%s", bare, portHint(req.GetProtocol(), bare))
		}
		req.Address = strings.ToLower(bare)
		return req, nil
	}
	switch {
	case addr.Zone() != "":
		return nil, usagef("%q: an address with a zone leaves no sandbox", bare)
	case addr.Is4In6():
		return nil, usagef("%q is an IPv4 address in IPv6 clothes; write %s", bare, addr.Unmap())
	}
	req.Address = addr.String()
	return req, nil
}

func portHint(protocol, host string) string {
	if protocol == "icmp" && strings.Count(host, ":") == 1 {
		return "; icmp has no port"
	}
	return ""
}

func join(target, port string) string {
	bare := strings.Trim(target, "[]")
	if strings.Contains(bare, ":") {
		return "[" + bare + "]:" + port
	}
	return bare + ":" + port
}
