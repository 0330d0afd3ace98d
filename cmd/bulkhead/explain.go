// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

func (c *cli) explainCmd() *cobra.Command {
	var exitCode bool
	cmd := &cobra.Command{
		Use:   "explain SANDBOX PROTOCOL ADDRESS[:PORT]",
		Short: "Say whether a sandbox may reach an address, and by whose rule",
		Long: `Say whether a sandbox may reach an address, and by whose rule. The answer comes from the
program in the kernel that decides about the packets themselves. Nothing is sent and
nothing is counted. PROTOCOL is tcp, udp or icmp; icmp has no port.`,
		Example: `  bulkhead explain web tcp 203.0.113.10:443
  bulkhead explain web udp [2001:db8::1]:53
  bulkhead explain web icmp 203.0.113.10
  bulkhead explain --exit-code web tcp 169.254.169.254:80   # 3 if denied`,
		Args:              args(3, 3, "SANDBOX PROTOCOL ADDRESS[:PORT]"),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, argv []string) error {
			req, err := flow(argv[0], argv[1], argv[2])
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
				_, err = fmt.Fprintln(c.stdout, render.Verdict(req, resp))
			}
			if err == nil && exitCode && !resp.GetAllowed() {
				return &exitError{code: exitDenied}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with 3 if it is denied")
	return cmd
}

// flow reads what is asked about.
func flow(ref, protocol, target string) (*nodev1.ExplainRequest, error) {
	protocol = strings.ToLower(protocol)
	req := &nodev1.ExplainRequest{Ref: ref, Protocol: protocol}
	host := target
	var port string
	switch protocol {
	case "tcp", "udp":
		if _, err := netip.ParseAddr(strings.Trim(target, "[]")); err == nil && !strings.Contains(target, "]:") {
			return nil, usagef("%s has no port; write it as in %s", target, join(target, "443"))
		}
		i := strings.LastIndexByte(target, ':')
		if i < 0 {
			return nil, usagef("%q is no address with a port; write 203.0.113.10:443 or [2001:db8::1]:443", target)
		}
		host, port = target[:i], target[i+1:]
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return nil, usagef("%q is no port; ports are 1 to 65535", port)
		}
		req.Port = uint32(n)
	case "icmp", "icmpv6", "icmp6", "ping":
		req.Protocol = "icmp"
	default:
		return nil, usagef("unknown protocol %q%s; there are tcp, udp and icmp", protocol, nearest(protocol, []string{"tcp", "udp", "icmp"}))
	}
	bare := strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	addr, err := netip.ParseAddr(bare)
	switch {
	case err != nil && req.Protocol == "icmp" && strings.Contains(bare, "."):
		return nil, usagef("%q is no address; icmp has no port and a name has to be looked up first", target)
	case err != nil:
		return nil, usagef("%q is no address; a name has to be looked up first", bare)
	case addr.Zone() != "":
		return nil, usagef("%q: an address with a zone leaves no sandbox", bare)
	case addr.Is4In6():
		return nil, usagef("%q is an IPv4 address in IPv6 clothes; write %s", bare, addr.Unmap())
	}
	req.Address = addr.String()
	return req, nil
}

func join(target, port string) string {
	bare := strings.Trim(target, "[]")
	if strings.Contains(bare, ":") {
		return "[" + bare + "]:" + port
	}
	return bare + ":" + port
}
